"""Python sources, found and read without importing them: their files, definitions, signatures and imports."""

from __future__ import annotations

import ast
import difflib
import importlib.machinery
import os
import pkgutil
import stat
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.errors import WrongInputError

What = Literal["module", "package", "class", "property", "function", "method"]
Function = ast.FunctionDef | ast.AsyncFunctionDef

MAX_SOURCE = 2 << 20  # bytes: a larger source is a generated table, and parsing takes 130 times its size in memory
TEST_FOLDERS = frozenset({"test", "tests"})
NO_SOURCE_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
NOT_STDLIB = frozenset({"idlelib", "lib2to3", "turtledemo"})  # programs and demonstrations that live beside the library

WHAT_IT_READS = "give a folder, a .py file, the name of an installed package, or stdlib"


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
class Unread:
    """A file or folder that was left out, why, and what exactly was seen there."""

    path: str
    reason: Literal["test folder", "linked folder", "not importable", "unreadable"]
    detail: str = ""


@dataclass(frozen=True)
class Place:
    """Where to look: one `.py` file, or a folder and everything in it."""

    path: Path
    name: str  # of the module or package; empty for a folder that is none


@dataclass(frozen=True)
class Definition:
    """A module, or a public class, property, function or method in it, as its source has it."""

    path: str  # within its module: "Path.glob"; empty for the module itself
    what: What
    docstring: str | None
    signature: Signature | None


@dataclass(frozen=True)
class Import:
    """One name that a module takes from another: `from module import name as alias`."""

    module: str
    name: str  # "*" for all
    alias: str


@dataclass(frozen=True)
class Module:
    """One source that was read."""

    name: str
    is_package: bool
    exports: tuple[str, ...] | None  # __all__, where it is a literal
    definitions: tuple[Definition, ...]
    names: frozenset[str]  # of its public classes and functions
    imports: tuple[Import, ...]


def locate(source: str) -> list[Place]:
    """The places that `source` means: `stdlib`, a folder, a `.py` file, or an importable name (a namespace has several).

    Raises WrongInputError where there is none, or no Python source.
    """
    if source == "stdlib":
        return [Place(Path(sysconfig.get_paths()["stdlib"]), "")]
    path = Path(source).expanduser()
    if path.is_dir():
        return [Place(path.resolve(), _package_name(path.resolve()))]
    if path.exists():
        if path.suffix != ".py":
            raise WrongInputError(f"{source}: is no Python source", "give a .py file, a folder or a package's name")
        return [Place(path.resolve(), ".".join(filter(None, [_package_name(path.resolve().parent), path.stem])))]
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


def _locate_by_name(name: str) -> list[Place]:
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
        return [Place(Path(folder), name) for folder in where]
    if not origin.endswith(".py") or not Path(origin).is_file():
        raise WrongInputError(
            f"{name}: is compiled or packed, there is no Python source to read", "give a package written in Python"
        )
    return [Place(Path(origin), name)]


def python_files(places: list[Place], *, skip: frozenset[str]) -> tuple[list[tuple[Path, str]], list[Unread]]:
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


def _module_name(file: Path, place: Place) -> str:
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


def read(path: Path, name: str) -> Module | Unread:
    """Parse one source, the module `name`; what cannot be read or parsed comes back as such, with the reason."""
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


def _module(name: str, is_package: bool, tree: ast.Module) -> Module:
    statements = list(_statements(tree.body))
    top = Definition("", "package" if is_package else "module", ast.get_docstring(tree), None)
    definitions = (top, *_definitions(statements, ""))
    return Module(
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


def _imports(statements: Iterable[ast.stmt], package: str) -> Iterator[Import]:
    for node in statements:
        if isinstance(node, ast.ImportFrom):
            above = package.split(".") if package else []
            base = ".".join(above[: len(above) - node.level + 1]) if node.level else ""
            for name in node.names:
                yield Import(".".join(filter(None, [base, node.module])), name.name, name.asname or name.name)


def _definitions(statements: Iterable[ast.stmt], within: str) -> Iterator[Definition]:
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
            yield Definition(path, "class", ast.get_docstring(node), _signature(init, within=path) if init else None)
            yield from _definitions(body, path)
        elif any("property" in decorator for decorator in _decorators(node)):
            yield Definition(path, "property", ast.get_docstring(node), None)
        else:
            yield Definition(
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
