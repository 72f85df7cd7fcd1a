"""Questions and answers from the docstrings and signatures of Python sources.

`collect` reads a folder, a `.py` file or an installed package; `pairs` asks and answers; `lines` renders JSON lines;
`write` puts them in place. Sources are parsed, never imported: no code of theirs runs. Same sources, same bytes:
everything is sorted by name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from cluster.errors import FailedError, RefusedError, WrongInputError
from launch import sources
from launch.prose import first_paragraph, is_deprecated, teaches_nothing, whole_sentences
from launch.sources import Definition, Module, Signature, Unread, What

Kind = Literal["meaning", "signature", "call"]
Format = Literal["qa", "completion"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_ANSWER = 400  # characters: three or four sentences


@dataclass(frozen=True)
class Item:
    """A public object: its name as a user writes it, its docstring's first prose, and how it is called, if it is."""

    name: str
    what: What
    text: str
    signature: Signature | None


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
    found, unread = sources.python_files(
        sources.locate(source), skip=sources.NOT_STDLIB if source == "stdlib" else frozenset()
    )
    if not found:
        raise WrongInputError(
            f"{source}: no Python file in it", "give a folder with .py files, or an installed package's name"
        )
    modules = []
    for done, (path, name) in enumerate(found, 1):
        read = sources.read(path, name)
        if isinstance(read, Module):
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


# Choosing what is public, and what it is called


def _items(modules: Sequence[Module]) -> tuple[tuple[Item, ...], Skipped]:
    """The public objects whose docstring teaches something, sorted by name."""
    skipped: Counter[str] = Counter()
    items: dict[str, Item] = {}
    texts: set[str] = set()
    for name, definition in sorted(_public(modules), key=lambda found: found[0]):
        text = first_paragraph(definition.docstring or "", name)
        if not definition.docstring:
            skipped["without_docstring"] += 1
        elif why := "uninformative" if is_deprecated(definition.docstring) else teaches_nothing(text, name):
            skipped[why] += 1
        elif name in items or text in texts:
            skipped["duplicate"] += 1
        else:
            items[name] = Item(name, definition.what, text, definition.signature)
            texts.add(text)
    return tuple(items.values()), Skipped(**skipped)


def _public(modules: Sequence[Module]) -> Iterator[tuple[str, Definition]]:
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


def _is_public(module: Module) -> bool:
    return not any(part.startswith("_") for part in module.name.split("."))


def _exported(module: Module, by_name: dict[str, Module]) -> list[str]:
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


def _home(module: str, name: str, by_name: dict[str, Module], seen: set[tuple[str, str]]) -> tuple[str, str] | None:
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
