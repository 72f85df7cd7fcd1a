"""YAML text to plain data and line numbers: YAML 1.2's core schema, one document, text keys given once, no tags.

Every error is a WrongInputError that starts with `at(line)`: a file's `FILE:LINE`, or the `--set` that was typed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.errors import WrongInputError

KeyPath = tuple[str | int, ...]

# Far above any honest file. Counted after aliases are followed: nine lines of aliases can stand for a billion entries.
_MOST_ENTRIES = 10_000
_MOST_DEPTH = 20


@dataclass(frozen=True)
class Located:
    """Plain data (dict, list, str, int, float, bool, None) and the 1-based line of each key path; `()` is the whole."""

    data: Any
    lines: Mapping[KeyPath, int]


def load(text: str, at: Callable[[int], str]) -> Located:
    """Read one YAML document; empty text is None.

    Raises:
        WrongInputError: bad syntax, a duplicate key, a tag, a key that is no text, aliases or nesting without end.
    """
    root = _compose(text, at)
    if root is None:
        return Located(None, {(): 1})
    builder = _Builder(at)
    return Located(builder.build(root, ()), builder.lines)


def dotted(path: KeyPath) -> str:
    """A key path as people write it: `datasets.0.path`."""
    return ".".join(printable(str(part)) for part in path)


def printable(text: str) -> str:
    """The text itself, or escaped where it would break a message's line or talk to the terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


class _CoreLoader(yaml.SafeLoader):
    """Resolves plain scalars by YAML 1.2's core schema instead of 1.1, which PyYAML follows.

    Under 1.1 a node named `no` is False, `1e-4` is text, `0123` is 83 and `1:30` is 90: nobody who writes a recipe
    means that.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own attribute: one table for each class of loader


_TAG = "tag:yaml.org,2002:"
for _kind, _pattern in {
    "null": r"|~|null|Null|NULL",
    "bool": r"true|True|TRUE|false|False|FALSE",
    # 0123 stays text: 1.1 and 1.2 disagree about its value, and an `env` means the digits.
    "int": r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan",
}.items():
    _CoreLoader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), None)


def _to_bool(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _to_int(text: str) -> int:
    if len(text) > 40:
        raise ValueError(text)
    return int(text, 0)


def _to_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _to_str(text: str) -> str:
    text.encode()  # "\ud800" is a legal YAML escape and no text
    return text


_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda _: None,
    _TAG + "bool": _to_bool,
    _TAG + "int": _to_int,
    _TAG + "float": _to_float,
    _TAG + "str": _to_str,
}

# PyYAML's words for the mistakes that people make, and ours.
_SYNTAX = (
    (r"character '\\t'", "a tab where YAML wants spaces", "indent with spaces"),
    (
        r"mapping values are not allowed",
        "a `key: value` where none can stand",
        "check the indentation; quote text that holds `: `",
    ),
    (
        r"expected <block end>",
        "the indentation does not fit the lines above",
        "keys of one mapping start in one column",
    ),
    (r"could not find expected ':'", "a key without `:`", "write `key: value`"),
    (r"end of stream", "a quote that is never closed", "close it"),
    (r"expected ',' or", "a bracket that is never closed", "close it"),
    (r"another document", "a second document after `---`", "keep one document"),
    (r"found character '(.)' that cannot", r"\1 cannot start a value", "put the value in quotes"),
)


def _compose(text: str, at: Callable[[int], str]) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_CoreLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise WrongInputError(
            f"{at(line)}: an unprintable character (U+{ord(text[error.position]):04X})", "remove it"
        ) from None
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "not YAML"
        matches = ((re.search(pattern, problem), what, fix) for pattern, what, fix in _SYNTAX)
        words = ((found.expand(what), fix) for found, what, fix in matches if found)
        what, fix = next(words, (problem, "see https://yaml.org for the syntax"))
        marks = (error.problem_mark, error.context_mark)
        opened = error.context_mark if "never closed" in what else None  # more use than where its absence shows
        line = next((mark.line for mark in (opened, *marks) if mark), 0) + 1
        raise WrongInputError(f"{at(line)}: {what}", fix) from None
    except (RecursionError, ValueError, OverflowError):  # the latter two: an escape such as "\UFFFFFFFF"
        raise WrongInputError(f"{at(1)}: nested too deeply, or an impossible escape", "simplify the file") from None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _Builder:
    """Turns a node graph into plain data, noting the line of each path."""

    def __init__(self, at: Callable[[int], str]) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._at = at
        self._entries = 0

    def build(self, node: yaml.Node, path: KeyPath, line: int | None = None) -> Any:
        line = line or _line(node)
        self.lines[path] = line
        self._entries += 1
        if self._entries > _MOST_ENTRIES or len(path) > _MOST_DEPTH:
            raise WrongInputError(
                f"{self._at(line)}: more entries than any such file needs", "use fewer aliases (*name), nest less"
            )
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return {key: self.build(value, (*path, key), at) for key, value, at in self._pairs(node, path)}
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(value, (*path, index)) for index, value in enumerate(node.value)]
        convert = _SCALARS.get(node.tag)
        if convert is None or not isinstance(node, yaml.ScalarNode):
            raise WrongInputError(
                f"{self._at(line)}: the tag {printable(node.tag.replace(_TAG, '!!'))} means nothing here", "remove it"
            )
        try:
            return convert(node.value)
        except (ValueError, KeyError):
            kind = node.tag.removeprefix(_TAG)
            raise WrongInputError(
                f"{self._at(line)}: {node.value[:40]!r} is no usable {kind}", "put text in quotes"
            ) from None

    def _pairs(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node, int]]:
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = _line(key)
            if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
                raise WrongInputError(f"{self._at(line)}: a key that is not text", "put the key in quotes")
            if key.value in seen:
                name = dotted((*path, key.value))
                raise WrongInputError(
                    f"{self._at(line)}: {name}: given twice, first in line {seen[key.value]}", "keep one of the two"
                )
            seen[key.value] = line
            yield _to_str(key.value), value, line
