"""YAML files that people write: read with line numbers, overridden with `--set`, checked by a pydantic model.

Shared by the inventory and the recipe. Every error is one WrongInputError in plain words:
`FILE:LINE: key: what is wrong; did you mean ...?`.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError, WrapValidator
from pydantic_core import ErrorDetails

from cluster import yamlcore
from cluster.errors import WrongInputError
from cluster.yamlcore import KeyPath, dotted, printable

M = TypeVar("M", bound=BaseModel)

# For every model behind such a file: nothing is coerced ("2" is no number), nothing unknown passes.
STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

# Names whose values are never shown.
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS", re.IGNORECASE)

# Far above any honest file, far below what PyYAML would chew on for minutes.
_MOST_BYTES = 256 * 1024


@dataclass(frozen=True)
class Document:
    """A file's plain data, the 1-based line of each key path, and the `--set` that each overridden path came from."""

    path: Path
    data: Any
    lines: Mapping[KeyPath, int]
    origins: Mapping[KeyPath, str] = field(default_factory=dict)


class WrongKeyError(ValueError):
    """Raised by a model's own validator to blame one key: `key` is a field's name, `problem` what is wrong with it."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


def says(what: str) -> WrapValidator:
    """A validator for a field whose type is a union: any refusal becomes `must be WHAT, not VALUE`."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError("is empty" if value is None else f"must be {what}, not {shown(value)}") from None

    return WrapValidator(check)


def shown(value: Any) -> str:
    """A value as an error message shows it: on one line, short, in YAML's words."""
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return json.dumps(value, default=str)


def closest(given: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest of the known spellings, or nothing."""
    plain = {spelling.lower(): spelling for spelling in known}
    near = difflib.get_close_matches(given.lower().replace("-", "_"), plain, n=1, cutoff=0.6)
    return f"; did you mean {plain[near[0]]}?" if near else ""


def read(path: Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    Raises:
        WrongInputError: it cannot be read, or is no YAML of the plain kind that yamlcore reads.
    """
    located = yamlcore.load(_text(path), lambda line: f"{path}:{line}")
    where = f"{path}:{located.lines[()]}"
    if located.data is None:
        raise WrongInputError(f"{where}: the file is empty", "it needs `key: value` lines")
    if not isinstance(located.data, dict):
        raise WrongInputError(
            f"{where}: expected `key: value` lines at the top level", "see the ready recipes for the form"
        )
    return Document(path, located.data, located.lines)


def override(document: Document, assignments: Sequence[str], spelled: Mapping[str, str] | None = None) -> Document:
    """Apply `key=value` assignments, dotted paths into mappings and lists (`restart.max=3`, `datasets.0.path=x`).

    Values are YAML; an empty one, or null, takes the key out, so that its default returns. With `spelled` (see
    `spellings`) an assignment also replaces a key that the file spells otherwise. Errors found later name the `--set`
    instead of a line.

    Raises:
        WrongInputError: an assignment without key or `=`, a value that is no YAML, a path that leads nowhere.
    """
    data, lines, origins = copy.deepcopy(document.data), dict(document.lines), dict(document.origins)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise WrongInputError(
                f"--set {_short(assignment)}: expected KEY=VALUE", "for example --set learning_rate=1e-4"
            )
        origin = f"--set {_short(key)}={_shown_text(parts, text)}"
        value = yamlcore.load(text, functools.partial(_at_origin, origin)).data
        synonyms = [other for other in data if _same(other, parts[0], spelled or {})]
        if len(parts) == 1:
            for synonym in synonyms:
                del data[synonym]
        elif synonyms:
            parts[0] = synonyms[0]
        path = _assign(data, parts, value, origin)
        lines = {known: line for known, line in lines.items() if known[: len(path)] != path}
        origins = {known: earlier for known, earlier in origins.items() if known[: len(path)] != path}
        origins[path] = origin
    return replace(document, data=data, lines=lines, origins=origins)


def parse(model: type[M], document: Document) -> M:
    """The document as a model.

    Validated as strict JSON: lists may become tuples and text may become addresses, but nothing else is coerced.

    Raises:
        WrongInputError: the first problem in the file's order, missing keys last; its second line counts the others.
    """
    try:
        return model.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
    first, *rest = _in_order(_problem(model, document, detail) for detail in details)
    more = f"and {len(rest)} more, first {rest[0].line}" if rest else ""
    raise WrongInputError(first.line, "; ".join(filter(None, (first.fix, more))))


def wrong(document: Document, model: type[BaseModel], path: KeyPath, what: str, fix: str = "") -> WrongInputError:
    """An error about one key, for checks that no schema can make; `path` starts with a field's name."""
    return WrongInputError(_Problem.at(document, _as_written(model, document, path), what).line, fix)


def spellings(model: type[BaseModel]) -> dict[str, str]:
    """Every accepted spelling of the model's keys, aliases included, to the field's name."""
    found = {}
    for name, info in model.model_fields.items():
        found[name] = name
        if isinstance(info.validation_alias, AliasChoices):
            found.update({choice: name for choice in info.validation_alias.choices if isinstance(choice, str)})
    return found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:  # not read_bytes: the file may be a model's, or have no end
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        what = {FileNotFoundError: "no such file", IsADirectoryError: "is a folder, not a file"}.get(
            type(error), error.strerror
        )
        raise WrongInputError(f"{path}: {what}", "give the path of a YAML file") from None
    if len(content) > _MOST_BYTES:
        raise WrongInputError(f"{path}: larger than {_MOST_BYTES // 1024} KiB", "give the path of a YAML file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise WrongInputError(f"{path}:{line}: not UTF-8 text", "save the file as UTF-8") from None


def _at_origin(origin: str, _line: int) -> str:
    return origin


def _shown_text(parts: Sequence[str], text: str) -> str:
    """The value of a `--set`; hidden where it may be a secret (`env.HF_TOKEN=...`)."""
    if (len(parts) > 1 and SECRET_NAME.search(parts[-1])) or ("{" in text and SECRET_NAME.search(text)):
        return "***"
    return _short(text)


def _short(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= 60 else line[:57] + "..."


def _same(one: str, other: str, spelled: Mapping[str, str]) -> bool:
    return spelled.get(one, one) == spelled.get(other, other)


def _assign(data: Any, parts: Sequence[str], value: Any, origin: str) -> KeyPath:
    """Put `value` into `data` in place; returns the path with list positions as numbers."""
    path: list[str | int] = []
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        step: str | int = part
        if isinstance(data, list):
            step = int(part) if part.isdecimal() else -1
            if not 0 <= step < len(data):
                raise WrongInputError(
                    f"{origin}: {dotted(tuple(path))} has no entry {part}; it has {len(data)}, counted from 0", ""
                )
        elif not isinstance(data, dict):
            raise WrongInputError(f"{origin}: {dotted(tuple(path))} is {shown(data)}, with no {part} in it", "")
        path.append(step)
        if not last:
            if isinstance(data, dict) and data.get(part) is None:
                data[part] = {}
            data = data[step]
        elif value is None and isinstance(data, dict):
            data.pop(part, None)
        else:
            data[step] = value
    return tuple(path)


@dataclass(frozen=True)
class _Problem:
    order: tuple[int, int]
    path: KeyPath
    line: str
    fix: str

    @classmethod
    def at(cls, document: Document, path: KeyPath, what: str, fix: str = "") -> _Problem:
        """Placed at the line, or the `--set`, of the longest known part of the path; overrides come first."""
        order, where = (1, 0), str(document.path)
        # `--set name.x=1` makes a mapping of a name that the file lacks: the assignment lies inside of what is wrong.
        inside = [origin for origin in document.origins if origin[: len(path)] == path and path not in document.lines]
        for part in (*inside, *(path[:length] for length in range(len(path), -1, -1))):
            if part in document.origins:
                order, where = (0, list(document.origins).index(part)), document.origins[part]
                break
            if part in document.lines:
                order, where = (1, document.lines[part]), f"{document.path}:{document.lines[part]}"
                break
        return cls(order, path, ": ".join(filter(None, (where, dotted(path), what))), fix)


def _in_order(problems: Iterable[_Problem]) -> list[_Problem]:
    """In the file's order, one for each key."""
    first_of: dict[KeyPath, _Problem] = {}
    for problem in sorted(problems, key=lambda problem: problem.order):
        first_of.setdefault(problem.path, problem)
    return list(first_of.values())


_WORDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping (`key: value` lines)",
    "model_type": "must be a mapping (`key: value` lines)",
    "greater_than": "must be above {gt:.12g}",
    "greater_than_equal": "must be at least {ge:.12g}",
    "less_than": "must be below {lt:.12g}",
    "less_than_equal": "must be at most {le:.12g}",
}

_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}  # YAML 1.1's


def _problem(model: type[BaseModel], document: Document, detail: ErrorDetails) -> _Problem:
    """One of pydantic's errors in our words."""
    path = _existing(document.data, detail["loc"])
    error = detail.get("ctx", {}).get("error")
    if detail["type"] == "missing":
        path = (*path, detail["loc"][-1])
    elif isinstance(error, WrongKeyError):
        path = _as_written(model, document, (*path, error.key))
    owner = _model_at(model, path[:-1])
    if detail["type"] == "missing":
        info = owner.model_fields.get(str(path[-1])) if owner else None
        problem = _Problem.at(document, path, "is missing", ((info and info.description) or "").rstrip("."))
        # After what stands in a line: a key is often missing because it is misspelt there.
        return replace(problem, order=(2 * problem.order[0], problem.order[1]))
    if detail["type"] == "extra_forbidden":
        siblings = functools.reduce(lambda data, step: data[step], path[:-1], document.data)
        return _Problem.at(document, path, _unknown(owner, siblings, str(path[-1])))
    return _Problem.at(document, path, *_wrong_value(detail))


def _wrong_value(detail: ErrorDetails) -> tuple[str, str]:
    """What is wrong with a value, and the fix if it is plain."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"]), ""
    if value is None:
        return "is empty", "give it a value, or delete the line"
    if kind == "literal_error":
        return _not_among(str(context["expected"]), value), ""
    words = _WORDS[kind].format(**context) if kind in _WORDS else detail["msg"].lower()
    guess = _BOOLEANS.get(str(value).lower()) if kind == "bool_type" else None
    quote = "put it in quotes" if kind == "string_type" and not isinstance(value, dict | list) else ""
    return f"{words}, not {shown(value)}" + (f"; did you mean {guess}?" if guess else ""), quote


def _not_among(expected: str, value: Any) -> str:
    choices = re.findall(r"'([^']*)'", expected)
    near = closest(value, choices) if isinstance(value, str) else ""
    return f"must be {expected.replace(chr(39), '')}, not {shown(value)}{near}"


def _unknown(inner: type[BaseModel] | None, siblings: Iterable[str], key: str) -> str:
    known = spellings(inner) if inner else {}
    for other in siblings:
        if (
            key in known and other != key and _same(other, key, known)
        ):  # pydantic took the other one and has this left over
            return f"means the same as {other}, which is given too; keep one"
    return f"unknown key{closest(key, known)}"


def _existing(data: Any, location: KeyPath) -> KeyPath:
    """The part of pydantic's location that the file has: the rest names a union's branch, a missing key or `[key]`."""
    path: list[str | int] = []
    for step in location:
        inside = (isinstance(data, dict) and step in data) or (
            isinstance(data, list) and isinstance(step, int) and step < len(data)
        )
        if not inside:
            break
        path.append(step)
        data = data[step]
    return tuple(path)


def _as_written(model: type[BaseModel], document: Document, path: KeyPath) -> KeyPath:
    """The path with its first key as the file spells it."""
    known = spellings(model)
    written = (key for key in document.data if path and _same(key, str(path[0]), known))
    return (next(written, path[0]), *path[1:]) if path else path


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model that the file's mapping at `path` fills, if one does."""
    current: type[BaseModel] | None = model
    for step in path:
        if isinstance(step, int):
            continue  # an entry of a list whose element type was found with the list
        if current is None:
            return None
        name = spellings(current).get(step)
        current = _model_in(current.model_fields[name].annotation) if name else None
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
