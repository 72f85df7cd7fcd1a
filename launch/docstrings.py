"""Questions and answers from the docstrings and signatures of Python sources.

`collect` reads a folder, a `.py` file or an installed package; `pairs` asks and answers; `lines` renders JSON lines;
`write` puts them in place. Sources are parsed, never imported: no code of theirs runs. Same sources, same bytes:
everything is sorted by name.
"""

from __future__ import annotations

import ast
import difflib
import importlib.machinery
import inspect
import json
import os
import pkgutil
import re
import stat
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from cluster.errors import FailedError, RefusedError, WrongInputError

Kind = Literal["meaning", "signature", "call"]
Format = Literal["qa", "completion"]
What = Literal["module", "package", "class", "property", "function", "method"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_ANSWER = 400  # characters: three or four sentences
MAX_SOURCE = 2 << 20  # bytes: a larger source is a generated table, and parsing takes 130 times its size in memory

TEST_FOLDERS = frozenset({"test", "tests"})
NO_SOURCE_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
NOT_STDLIB = frozenset({"idlelib", "lib2to3", "turtledemo"})  # programs and demonstrations that live beside the library

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Signature:
    """How an object is called: `parameters` as in the source, `required` and `optional` as a caller passes them."""

    parameters: str
    returns: str
    required: str
    optional: str
    on_instance: bool
    awaited: bool


@dataclass(frozen=True)
class Item:
    """A public object: its name as a user writes it, its docstring's first prose, and how it is called, if it is."""

    name: str
    what: What
    text: str
    signature: Signature | None


@dataclass(frozen=True)
class Unread:
    """A file or folder that was left out, why, and what exactly was seen there."""

    path: str
    reason: Literal["test folder", "linked folder", "not importable", "unreadable"]
    detail: str = ""


@dataclass(frozen=True)
class Skipped:
    """How many public objects gave no item, by reason."""

    without_docstring: int = 0
    too_short: int = 0
    uninformative: int = 0
    duplicate: int = 0


@dataclass(frozen=True)
class Harvest:
    """What `collect` found: items sorted by name, the number of files read, and all that was left out."""

    source: str
    items: tuple[Item, ...]
    files: int
    skipped: Skipped
    unread: tuple[Unread, ...]


@dataclass(frozen=True)
class Pair:
    """A question about the object `name`, and its answer."""

    name: str
    kind: Kind
    question: str
    answer: str


def collect(source: str, *, progress: Callable[[int, int], None] | None = None) -> Harvest:
    """Read every public docstring of `source`; `progress(done, total)` counts files.

    `source` is `stdlib`, a folder, a `.py` file, or the name of a package or module on `sys.path`; a path that exists
    wins over a name.
    Raises WrongInputError when it is not there, holds no Python file, or has no docstring that teaches anything.
    """
    found, unread = _python_files(_locate(source), skip=NOT_STDLIB if source == "stdlib" else frozenset())
    if not found:
        raise WrongInputError(
            f"{source}: no Python file in it", "give a folder with .py files, or an installed package's name"
        )
    modules = []
    for done, (path, name) in enumerate(found, 1):
        read = _read(path, name)
        if isinstance(read, _Module):
            modules.append(read)
        else:
            unread.append(read)
        if progress:
            progress(done, len(found))
    items, skipped = _items(modules)
    if not items:
        raise WrongInputError(
            f"{source}: no docstring to learn from ({_why_none(skipped, unread)})",
            "give sources whose public objects say what they do",
        )
    return Harvest(source, items, len(modules), skipped, tuple(unread))


def pairs(
    harvest: Harvest, *, kinds: Sequence[Kind] = KINDS, max_answer: int | None = MAX_ANSWER, limit: int | None = None
) -> list[Pair]:
    """Ask each of `kinds` of each item; sorted by name.

    A meaning is cut to whole sentences within `max_answer` characters; what cannot be cut is left out (None: no bound).
    With `limit`, an evenly spaced selection: every module and every kind keeps its share.
    """
    asked = [
        pair for kind in KINDS if kind in kinds for item in harvest.items if (pair := _ask(item, kind, max_answer))
    ]
    if limit is not None and limit < len(asked):
        asked = [asked[i * len(asked) // limit] for i in range(limit)]
    return sorted(asked, key=lambda pair: (pair.name, KINDS.index(pair.kind)))


def _ask(item: Item, kind: Kind, max_answer: int | None) -> Pair | None:
    name, signature = item.name, item.signature
    if kind == "meaning":
        question = {"module": f"What is the {name} module for?", "package": f"What is the {name} package for?"}.get(
            item.what, f"What is {name}?" if item.what in ("class", "property") else f"What does {name} do?"
        )
        answer = whole_sentences(item.text, max_answer)
    elif signature is None:
        return None
    elif kind == "signature":
        question = f"What is the signature of {name}?"
        answer = f"{'async ' * signature.awaited}{name}({signature.parameters}){signature.returns}"
    else:
        question = f"How do I call {name}?"
        owner, _, last = name.rpartition(".")
        verb = "Await" if signature.awaited else "Call"
        answer = (
            f"{verb} {last}({signature.required}) on the {owner} object"
            if signature.on_instance
            else f"{verb} {name}({signature.required})"
        )
        answer += f"; optional: {signature.optional}." if signature.optional else "."
    return Pair(name, kind, question, answer) if answer and (max_answer is None or len(answer) <= max_answer) else None


def lines(chosen: Iterable[Pair], form: Format = "qa") -> list[str]:
    """JSON objects, one a pair: `{"question", "answer"}` for qa, `{"text": "name: answer"}` for completion."""
    if form == "qa":
        return [json.dumps({"question": pair.question, "answer": pair.answer}, ensure_ascii=False) for pair in chosen]
    return [json.dumps({"text": f"{pair.name}: {pair.answer}"}, ensure_ascii=False) for pair in chosen]


def check_output(path: Path, *, force: bool) -> None:
    """Raise WrongInputError where no file can be, RefusedError where one is already, unless `force`."""
    if not path.parent.is_dir():
        raise WrongInputError(f"{path}: there is no folder {path.parent}", f"mkdir -p {path.parent}")
    if path.exists() and not path.is_file():
        raise WrongInputError(f"{path}: is no file that could be replaced", "give the name of a new file")
    if path.exists() and not force:
        raise RefusedError(f"{path}: is already there", "give another name, or --force to replace it")


def write(path: Path, rendered: Sequence[str], *, force: bool = False) -> None:
    """Write the lines to `path`, whole or not at all. Raises as `check_output`, and FailedError if the disk refuses."""
    check_output(path, force=force)
    target = path.resolve()  # a link keeps pointing where it did
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with beside.open("x", encoding="utf-8", newline="\n") as out:
            out.writelines(line + "\n" for line in rendered)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(target)
    except OSError as error:
        raise FailedError(
            f"{path}: could not be written: {error.strerror}", "check the folder's permissions and free space"
        ) from error
    finally:
        with suppress(OSError):  # it is there no more, unless something went wrong
            beside.unlink()


def _why_none(skipped: Skipped, unread: Sequence[Unread]) -> str:
    counts = [f"{count} {reason.replace('_', ' ')}" for reason, count in asdict(skipped).items() if count]
    broken = [f"{file.path}: {file.detail}" for file in unread if file.reason == "unreadable"]
    return "; ".join([", ".join(counts), *broken[:1]]).strip("; ") or "nothing public"


# Finding the files

WHAT_IT_READS = "give a folder, a .py file, the name of an installed package, or stdlib"


@dataclass(frozen=True)
class _Place:
    path: Path
    name: str  # of the module or package; empty for a folder that is none


def _locate(source: str) -> list[_Place]:
    if source == "stdlib":
        return [_Place(Path(sysconfig.get_paths()["stdlib"]), "")]
    path = Path(source).expanduser()
    if path.is_dir():
        return [_Place(path.resolve(), _package_name(path.resolve()))]
    if path.exists():
        if path.suffix != ".py":
            raise WrongInputError(f"{source}: is no Python source", "give a .py file, a folder or a package's name")
        return [_Place(path.resolve(), ".".join(filter(None, [_package_name(path.resolve().parent), path.stem])))]
    if not all(part.isidentifier() for part in source.split(".")):
        raise WrongInputError(f"{source}: there is no such file or folder", WHAT_IT_READS)
    return _locate_by_name(source)


def _package_name(folder: Path) -> str:
    """`a.b` for a folder that is imported as such, empty for one that is no package."""
    parts: list[str] = []
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts)


def _locate_by_name(name: str) -> list[_Place]:
    """Follow a dotted name over `sys.path` as an import would, without running any `__init__`."""
    where = list(sys.path)
    origin = ""
    for part in name.split("."):
        # The bare part, not the dotted name: a namespace package would look for its parent among the imported modules.
        spec = importlib.machinery.PathFinder.find_spec(part, where)
        if spec is None:
            here = sorted(module.name for module in pkgutil.iter_modules(where))
            nearest = difflib.get_close_matches(part, ["stdlib", *here] if part == name else here, 1)
            raise WrongInputError(
                f"{name}: there is no such folder, file or installed package" + f" (no {part})" * (part != name),
                f"did you mean {name[: -len(part)] if name.endswith(part) else ''}{nearest[0]}?"
                if nearest
                else WHAT_IT_READS,
            )
        where, origin = list(spec.submodule_search_locations or ()), spec.origin or ""
    if where:
        return [_Place(Path(folder), name) for folder in where]
    if not origin.endswith(".py") or not Path(origin).is_file():
        raise WrongInputError(
            f"{name}: is compiled or packed, there is no Python source to read", "give a package written in Python"
        )
    return [_Place(Path(origin), name)]


def _python_files(places: list[_Place], *, skip: frozenset[str]) -> tuple[list[tuple[Path, str]], list[Unread]]:
    """Each source with its module's name, sorted by path; and what was left out."""
    found: list[tuple[Path, str]] = []
    unread: list[Unread] = []
    for place in places:
        if not place.path.is_dir():
            found.append((place.path, place.name))
            continue
        for folder, folders, files in os.walk(
            place.path, onerror=lambda e: unread.append(Unread(str(e.filename), "unreadable", str(e.strerror)))
        ):
            here = Path(folder)
            if "pyvenv.cfg" in files:  # an environment: other people's packages
                folders.clear()
                continue
            folders[:] = [sub for sub in sorted(folders) if _is_entered(here / sub, skip, unread)]
            for file in sorted(files):
                if not file.endswith(".py"):
                    continue
                if name := _module_name(here / file, place):
                    found.append((here / file, name))
                else:
                    unread.append(Unread(str(here / file), "not importable"))
    return found, unread


def _is_entered(folder: Path, skip: frozenset[str], unread: list[Unread]) -> bool:
    if folder.name.startswith(".") or folder.name in NO_SOURCE_FOLDERS | skip:
        return False
    if folder.is_symlink():  # it may lead anywhere, also back to where we are
        unread.append(Unread(str(folder), "linked folder"))
        return False
    if folder.name in TEST_FOLDERS:
        unread.append(Unread(str(folder), "test folder"))
        return False
    return True


def _module_name(file: Path, place: _Place) -> str:
    """The dotted name that an import would use; empty where none can.

    Inside a package, from the outermost folder with an `__init__.py`; else from the folder given, or from `src` in it.
    """
    parts = list(file.relative_to(place.path).with_suffix("").parts)
    if not place.name:
        package = _package_name(file.parent)
        above = [i for i, part in enumerate(parts[:-1]) if part == "src" or not part.isidentifier()]
        parts = [*package.split("."), file.stem] if package else parts[above[-1] + 1 if above else 0 :]
    else:
        parts = [*place.name.split("."), *parts]
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts) if all(part.isidentifier() for part in parts) else ""


# Reading one source


@dataclass(frozen=True)
class _Definition:
    path: str  # within its module: "Path.glob"; empty for the module itself
    what: What
    docstring: str | None
    signature: Signature | None


@dataclass(frozen=True)
class _Import:
    module: str
    name: str  # "*" for all
    alias: str


@dataclass(frozen=True)
class _Module:
    name: str
    is_package: bool
    exports: tuple[str, ...] | None  # __all__, where it is a literal
    definitions: tuple[_Definition, ...]
    names: frozenset[str]  # of its public classes and functions
    imports: tuple[_Import, ...]


def _read(path: Path, name: str) -> _Module | Unread:
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            return Unread(str(path), "unreadable", "no regular file")
        if facts.st_size > MAX_SOURCE:
            return Unread(str(path), "unreadable", f"{facts.st_size:,} bytes, more than {MAX_SOURCE:,}")
        with (
            tokenize.open(path) as source,
            warnings.catch_warnings(action="ignore"),
        ):  # its invalid escapes are not our user's concern
            return _module(name, path.name == "__init__.py", ast.parse(source.read()))
    except SyntaxError as error:
        return Unread(str(path), "unreadable", f"line {error.lineno}: {error.msg}" if error.lineno else str(error.msg))
    except (OSError, ValueError, RecursionError, MemoryError) as error:  # ValueError: null bytes, undecodable text
        return Unread(str(path), "unreadable", getattr(error, "strerror", None) or f"{type(error).__name__}: {error}")


def _module(name: str, is_package: bool, tree: ast.Module) -> _Module:
    statements = list(_statements(tree.body))
    top = _Definition("", "package" if is_package else "module", ast.get_docstring(tree), None)
    definitions = (top, *_definitions(statements, ""))
    return _Module(
        name,
        is_package,
        _literal_all(statements),
        definitions,
        frozenset(definition.path.partition(".")[0] for definition in definitions[1:]),
        tuple(_imports(statements, name if is_package else name.rpartition(".")[0])),
    )


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run on import, those under `if`, `try` and `with` included."""
    for node in body:
        if isinstance(node, ast.If):
            if "__name__" not in ast.unparse(node.test):  # a script's main part is not there for who imports it
                yield from _statements(node.body)
            yield from _statements(node.orelse)
        elif isinstance(node, ast.Try | ast.TryStar):
            handlers = [statement for handler in node.handlers for statement in handler.body]
            yield from _statements([*node.body, *node.orelse, *node.finalbody, *handlers])
        elif isinstance(node, ast.With):
            yield from _statements(node.body)
        else:
            yield node


def _literal_all(statements: Iterable[ast.stmt]) -> tuple[str, ...] | None:
    names: list[str] = []
    seen = False
    for node in statements:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="__all__")], value=value)
                | ast.AnnAssign(target=ast.Name(id="__all__"), value=ast.expr() as value)
                | ast.AugAssign(target=ast.Name(id="__all__"), value=value)
                | ast.Expr(
                    value=ast.Call(func=ast.Attribute(value=ast.Name(id="__all__"), attr="extend"), args=[value])
                )
            ):
                seen = True
            case _:
                continue
        try:
            names.extend(str(name) for name in ast.literal_eval(value))
        except (ValueError, TypeError):
            return None
    return tuple(names) if seen else None


def _imports(statements: Iterable[ast.stmt], package: str) -> Iterator[_Import]:
    for node in statements:
        if isinstance(node, ast.ImportFrom):
            above = package.split(".") if package else []
            base = ".".join(above[: len(above) - node.level + 1]) if node.level else ""
            for name in node.names:
                yield _Import(".".join(filter(None, [base, node.module])), name.name, name.asname or name.name)


def _definitions(statements: Iterable[ast.stmt], within: str) -> Iterator[_Definition]:
    """Public classes and functions; of several by one name (alternatives for platforms) the first with a docstring."""
    chosen: dict[str, ast.ClassDef | Function] = {}
    for node in statements:
        if not isinstance(node, ast.ClassDef | Function) or _decorators(node) & {"overload", "setter", "deleter"}:
            continue
        if not node.name.startswith("_") and (node.name not in chosen or not ast.get_docstring(chosen[node.name])):
            chosen[node.name] = node
    for name, node in chosen.items():
        path = f"{within}.{name}" if within else name
        if isinstance(node, ast.ClassDef):
            body = list(_statements(node.body))
            init = next((n for n in body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
            yield _Definition(path, "class", ast.get_docstring(node), _signature(init, within=path) if init else None)
            yield from _definitions(body, path)
        elif any("property" in decorator for decorator in _decorators(node)):
            yield _Definition(path, "property", ast.get_docstring(node), None)
        else:
            yield _Definition(
                path, "method" if within else "function", ast.get_docstring(node), _signature(node, within=within)
            )


def _decorators(node: ast.ClassDef | Function) -> set[str]:
    """The last part of each decorator's name: `property`, `setter`, `overload`."""
    bare = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return {ast.unparse(decorator).rpartition(".")[2] for decorator in bare}


def _signature(node: Function, *, within: str) -> Signature:
    args = node.args
    decorators = _decorators(node)
    positional = [*args.posonlyargs, *args.args]
    first_default = len(positional) - len(args.defaults)
    required = [arg.arg for arg in positional[:first_default]]
    optional = [
        f"{arg.arg}={ast.unparse(default)}"
        for arg, default in zip(positional[first_default:], args.defaults, strict=True)
    ]
    if within and "staticmethod" not in decorators:
        required = required[1:]  # self, or cls
    if args.vararg:
        optional.append("*" + args.vararg.arg)
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        if default is None:
            required.append(f"{arg.arg}=...")
        else:
            optional.append(f"{arg.arg}={ast.unparse(default)}")
    if args.kwarg:
        optional.append("**" + args.kwarg.arg)
    on_instance = bool(within) and node.name != "__init__" and not decorators & {"staticmethod", "classmethod"}
    return Signature(
        parameters=ast.unparse(
            args if on_instance or not within or "staticmethod" in decorators else _without_first(args)
        ),
        returns=f" -> {ast.unparse(node.returns)}" if node.returns else "",
        required=", ".join(required),
        optional=", ".join(optional),
        on_instance=on_instance,
        awaited=isinstance(node, ast.AsyncFunctionDef) and not any(isinstance(n, ast.Yield) for n in ast.walk(node)),
    )


def _without_first(args: ast.arguments) -> ast.arguments:
    """The parameters as a caller sees them through a class: less `self` or `cls`."""
    return ast.arguments(
        posonlyargs=args.posonlyargs[1:],
        args=args.args if args.posonlyargs else args.args[1:],
        vararg=args.vararg,
        kwonlyargs=args.kwonlyargs,
        kw_defaults=args.kw_defaults,
        kwarg=args.kwarg,
        defaults=args.defaults,
    )


# Choosing what is public, and what it is called


def _items(modules: Sequence[_Module]) -> tuple[tuple[Item, ...], Skipped]:
    """The public objects whose docstring teaches something, sorted by name."""
    skipped: Counter[str] = Counter()
    items: dict[str, Item] = {}
    texts: set[str] = set()
    for name, definition in sorted(_public(modules), key=lambda found: found[0]):
        text = first_paragraph(definition.docstring or "", name)
        if not definition.docstring:
            skipped["without_docstring"] += 1
        elif why := "uninformative" if _DEPRECATED.search(definition.docstring) else _teaches_nothing(text, name):
            skipped[why] += 1
        elif name in items or text in texts:
            skipped["duplicate"] += 1
        else:
            items[name] = Item(name, definition.what, text, definition.signature)
            texts.add(text)
    return tuple(items.values()), Skipped(**skipped)


def _public(modules: Sequence[_Module]) -> Iterator[tuple[str, _Definition]]:
    """Every public definition as a user writes it: `asyncio.gather`, though it is defined in `asyncio.tasks`."""
    by_name = {module.name: module for module in modules}
    short: dict[tuple[str, str], str] = {}
    for module in filter(_is_public, modules):
        for name in _exported(module, by_name):
            home = _home(module.name, name, by_name, set())
            if home is None:
                continue
            if f"{home[0]}.".startswith(f"{module.name}.") or not _is_public(by_name[home[0]]):
                candidate = f"{module.name}.{name}"
                short[home] = min(short.get(home, candidate), candidate, key=lambda n: (n.count("."), n))
    for module in modules:
        for definition in module.definitions:
            top, _, rest = definition.path.partition(".")
            if not top:
                if _is_public(module):
                    yield module.name, definition
            elif (module.name, top) in short:
                yield ".".join(filter(None, [short[module.name, top], rest])), definition


def _is_public(module: _Module) -> bool:
    return not any(part.startswith("_") for part in module.name.split("."))


def _exported(module: _Module, by_name: dict[str, _Module]) -> list[str]:
    """What `import *` gives; but without an `__all__`, a plain module does not pass on what it imports one by one."""
    if module.exports is not None:
        return list(module.exports)
    names = list(module.names)
    for imported in module.imports:
        if imported.name != "*":
            names += [imported.alias] if module.is_package and not imported.alias.startswith("_") else []
        elif (target := by_name.get(imported.module)) and target is not module:
            names += target.exports or target.names
    return names


def _home(module: str, name: str, by_name: dict[str, _Module], seen: set[tuple[str, str]]) -> tuple[str, str] | None:
    """The module that defines what `module` offers as `name`, and its name there: found by following imports."""
    here = by_name.get(module)
    if here is None or (module, name) in seen:
        return None
    if name in here.names:
        return module, name
    seen.add((module, name))
    for imported in here.imports:
        if imported.alias == name or imported.name == "*":
            found = _home(imported.module, name if imported.name == "*" else imported.name, by_name, seen)
            if found:
                return found
    return None


# A docstring's first paragraph, as prose

_RULE = re.compile(r"^([=\-~^*#\"`+.])\1{2,}$")
_SIGNATURE = re.compile(  # `name(a, b=(1, 2)) -> what it gives`, `x, y = name(a)`
    r"^([\w\s,()\[\]]+ = )?(<\w+>\.)?[\w.]+\([^()]*(\([^()]*\)[^()]*)*\)(\s*(->|=>).*|[:.]?)$|^->"
)
_LICENCE = re.compile(r"^(copyright|authors?|licen[sc]ed?|written by|created (on|by)|\$|#!|spdx|version)\b", re.I)
_END_OF_PROSE = re.compile(  # a doctest, directive, field, list, table or section begins here
    r"^(>>>|\.\. |:\w[\w ]*:(?!`)|@\w+|[-*+•] |\(?\w[.)] |\+[-=]+\+|\||\$ "
    r"|(args|arguments|param(eter)?s?|keyword arg(ument)?s|returns?|yields?|raises?|examples?|notes?|usage|attributes"
    r"|see also|warnings?|todo)\s*:*\s*$)",
    re.I,
)
_MARKUP = (
    (re.compile(r"(?::[\w:.+-]+:)?`([^`<]+?)\s*<[^`>]+>`_{0,2}"), r"\1"),  # :role:`title <target>`, `text <address>`_
    (re.compile(r"(?::[\w:.+-]+:)?`~(?:[^`]*\.)?([^`.]+)`"), r"\1"),  # :class:`~package.Name`
    (re.compile(r"``(.+?)``"), r"\1"),
    (re.compile(r"(?::[\w:.+-]+:)?`[.!]?([^`]+)[`']_{0,2}"), r"\1"),
    (re.compile(r"\[([^][]+)\]\([^()\s]+\)"), r"\1"),  # Markdown's link
    (re.compile(r"(?<![\w*])(\*\*?)(\w[\w .]*\w|\w)\1(?![\w*])"), r"\2"),
    (re.compile(r"\b[LCBIU]\{([^}]*)\}"), r"\1"),  # epytext
    (re.compile(r"[,;]?\s*\b(e\.g\.|i\.e\.|for example|for instance|as follows|like this|like so),?\s*:+$", re.I), "."),
)
_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\bapprox)[.!?][\"')\]]*(?=\s+[^a-z\s]|$)"
)
_UNINFORMATIVE = re.compile(
    r"^(internal|private|todo|fixme|xxx|see|same as|undocumented|overrid\w+|inherit\w*|not implemented|helper"
    r"|do not use|constructor|initiali[sz]es? (self|the (instance|object|class))|dummy|stub|no-?op|abstract method|none"
    r"|ditto|as above|like)\b|\bdeprecated\b|\bfor (internal|backward\w*) ",
    re.I,
)
_DEPRECATED = re.compile(
    r"^\.\. deprecated::|\bdeprecated since\b|\bthis (method|function|class|module|property) is deprecated", re.I | re.M
)
_FILLERS = frozenset({"a", "an", "the", "of", "this", "class", "function", "method", "module"})


def first_paragraph(docstring: str, name: str) -> str:
    """The first prose of `name`'s docstring in one line, without headings and markup; empty where there is none."""
    encodable = docstring.encode("utf-8", "ignore").decode()  # an escape may stand for half a character
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(encodable)):
        rows = _below_heading([row.strip() for row in paragraph.splitlines() if row.strip()], name)
        if not rows or rows[0].startswith(">>>") or _LICENCE.match(rows[0]):
            continue
        end = next((i for i, row in enumerate(rows) if _END_OF_PROSE.match(row)), len(rows))
        colon = next((i + 1 for i, row in enumerate(rows) if row.endswith(":")), end)
        text = _prose(" ".join(rows[: min(end, colon)]), name)
        if text.strip(".").casefold() != name.casefold():
            return text  # also when empty: what follows a list or a colon explains that, not the object
    return ""


def _below_heading(rows: list[str], name: str) -> list[str]:
    """A paragraph's lines without a title, the signature or a command's synopsis at its top."""
    if len(rows) > 1 and _RULE.match(rows[0]):
        rows = rows[1:]  # a title between two rules
    if len(rows) > 1 and _RULE.match(rows[1]):
        rows = rows[2:]
    sentence_begun = False
    while rows and (_SIGNATURE.match(rows[0]) or not re.search(r"\w", rows[0]) or _is_usage(rows, name)):
        sentence_begun = "->" in rows[0]
        rows = rows[1:]
    if sentence_begun and rows and rows[0][0].islower():
        return []  # `pop(key) -> value, removes the key and returns its`, and here the rest of it
    return rows


def _is_usage(rows: Sequence[str], name: str) -> bool:
    """A command's synopsis above its explanation: `unalias name`, and below it a sentence."""
    command = name.rpartition(".")[2].removeprefix("do_")
    if len(rows) < 2 or rows[0][-1] in ".,":
        return False
    first, below = rows[0].split()[0], rows[1].split()[0]
    return re.sub(r"[()]", "", first) == command and (below[0].isupper() or below == first)  # u(p): may be shortened


def _prose(text: str, name: str) -> str:
    last = re.escape(name.rpartition(".")[2])
    text = re.sub(
        rf"^(({last}|{re.escape(name)})(\.py)?(\([^()]*\))?\s*(--?|—|:)|[\w,\[\] ]+ ->)\s+", "", " ".join(text.split())
    )
    for pattern, plain in _MARKUP:
        text = pattern.sub(plain, text)
    text = text.rstrip(" -,;")
    if text.endswith(":"):  # it introduces what was dropped: the sentences before it stand on their own
        text = text[: max((match.end() for match in _SENTENCE_END.finditer(text)), default=0)]
    if (first := re.match(r"[a-z]+(?=\s)", text)) and first[0] != name.rpartition(".")[2]:
        text = text[0].upper() + text[1:]
    return text if not text or re.search(r"[.!?][\"')\]]*$", text) else text + "."


def _teaches_nothing(text: str, name: str) -> Literal["too_short", "uninformative"] | None:
    is_torn = text.count("(") != text.count(")") or re.match(r"\w+=|.{,80}->", text)  # a signature's remains
    if not text or is_torn or _UNINFORMATIVE.search(text):
        return "uninformative"
    words = re.findall(r"\w+", text.casefold())
    if len(words) < 3:
        return "too_short"
    own = re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).casefold())
    return "uninformative" if _FILLERS.union(own).issuperset(words) else None


def whole_sentences(text: str, limit: int | None) -> str:
    """As many whole sentences from the start of `text` as `limit` characters hold; empty where not even one fits."""
    if limit is None or len(text) <= limit:
        return text
    return text[: max((match.end() for match in _SENTENCE_END.finditer(text) if match.end() <= limit), default=0)]
