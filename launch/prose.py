"""A docstring's first paragraph as plain prose, cut to whole sentences, and judged: does it teach anything?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Literal

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


def is_deprecated(docstring: str) -> bool:
    """Whether the docstring says that its object should no longer be used."""
    return bool(_DEPRECATED.search(docstring))


def teaches_nothing(text: str, name: str) -> Literal["too_short", "uninformative"] | None:
    """Why the prose `text` is no answer to a question about `name`; None where it is one."""
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
