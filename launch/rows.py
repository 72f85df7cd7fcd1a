"""The rows of a dataset: read, checked and named by file and line, without torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cluster.errors import WrongInputError

RowType = Literal["chat_template", "alpaca", "completion", "qa"]

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """Either a conversation, whose assistant turns are learned, or plain `text`, learned whole; `where` is FILE:LINE."""

    turns: tuple[Turn, ...] = ()
    text: str = ""
    where: str = field(default="", compare=False)


def read(path: Path, row_type: RowType, bad: Callable[[WrongInputError], None] | None = None) -> Iterator[Row]:
    """Yield the rows of a file (JSON lines, a JSON list, CSV or Parquet), or of all such files in a folder by name, in order.

    Args:
        bad: told of each bad row, which is left out then; without it the first one is raised.

    Raises:
        WrongInputError: it is missing or empty, cannot be read as its ending says, or a row lacks what `row_type` needs; names
            file and line, or file and row where there are no lines.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in _READERS) if _is_folder(path) else [path]
    empty = True
    for file in files:
        for data, where in _READERS.get(file.suffix, _json_lines)(file):
            empty = False
            try:
                row = _row(data, row_type, where)
            except WrongInputError as wrong:
                if bad is None:
                    raise
                bad(wrong)
            else:
                yield row
    if empty:
        what = "the dataset is empty" if files else f"no data file lies in this folder ({', '.join(_READERS)})"
        raise WrongInputError(f"{path}: {what}", "it needs at least one row, such as a line of JSON")


def check(path: Path, row_type: RowType, *, skip_bad: bool = False) -> None:
    """Read all rows and keep none.

    Raises:
        WrongInputError: see `read`; or, where bad ones are skipped, not a single one is good.
    """
    bad: list[WrongInputError] = []
    good = sum(1 for _ in read(path, row_type, bad.append if skip_bad else None))
    if bad and not good:
        raise WrongInputError(f"all {len(bad)} rows are bad; the first: {bad[0].message}", bad[0].fix)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _open(path: Path) -> BinaryIO:
    try:
        if path.is_file():
            return path.open("rb")
        what = "no such dataset file"
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
    raise WrongInputError(
        f"{path}: {what}", "give `datasets[].path` a .jsonl file; `sparkctl dataset SOURCE -o FILE` makes one"
    )


def _json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield _parsed(line, where), where


def _json_list(path: Path) -> Iterator[tuple[Any, str]]:
    with _open(path) as file:
        text = file.read()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):  # JSON lines under another name, or no JSON, whose line is named then
        yield from _json_lines(path)
        return
    for number, row in enumerate(data if isinstance(data, list) else [data], start=1):
        yield row, f"{path}: row {number}"


def _csv(path: Path) -> Iterator[tuple[Any, str]]:
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for row in reader:
                yield row, f"{path}:{reader.line_num}"
        except (csv.Error, UnicodeDecodeError) as error:
            raise WrongInputError(
                f"{path}:{reader.line_num + 1}: no CSV ({error})",
                "a .csv dataset is UTF-8, its first line names the columns",
            ) from None


def _parquet(path: Path) -> Iterator[tuple[Any, str]]:
    _open(path).close()
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise WrongInputError(
            f"{path}: reading Parquet takes pyarrow, which is not installed", "pip install pyarrow"
        ) from None
    try:
        number = 0
        for batch in ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}: row {number}"
    except (ArrowException, OSError) as error:
        raise WrongInputError(f"{path}: no Parquet ({str(error).splitlines()[0]})", "make the file again") from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[Any, str]]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _parsed(line: bytes, where: str) -> Any:
    """What a line holds, or the error itself, so that the lines after it can be read all the same."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "msg", str(error))
        return WrongInputError(f"{where}: no JSON ({reason})", "each line of a .jsonl dataset is one JSON object")


def _row(data: Any, row_type: RowType, where: str) -> Row:
    if isinstance(data, WrongInputError):
        raise data
    if not isinstance(data, dict):
        raise WrongInputError(f"{where}: expected a JSON object, found {type(data).__name__}", _EXPECTED[row_type])
    try:
        return replace(_PARSERS[row_type](data), where=where)
    except _MissingError as missing:
        raise WrongInputError(f"{where}: {missing}", _EXPECTED[row_type]) from None


class _MissingError(Exception):
    """What a row lacks, in words."""


def _text(data: dict[str, Any], key: str, *, empty: bool = False) -> str:
    value = data.get(key)
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is no text ({type(value).__name__})"
        raise _MissingError(f"{key}: {found}")
    if not value.strip() and not empty:
        raise _MissingError(f"{key}: is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can say it, no tokenizer takes it
        raise _MissingError(f"{key}: holds half of a surrogate pair, which is no character") from None
    return value


def _qa(data: dict[str, Any]) -> Row:
    return Row(turns=(Turn("user", _text(data, "question")), Turn("assistant", _text(data, "answer"))))


def _completion(data: dict[str, Any]) -> Row:
    return Row(text=_text(data, "text"))


def _alpaca(data: dict[str, Any]) -> Row:
    context = _text(data, "input", empty=True)
    question = _text(data, "instruction") + (f"\n\n{context}" if context else "")
    return Row(turns=(Turn("user", question), Turn("assistant", _text(data, "output"))))


def _chat(data: dict[str, Any]) -> Row:
    messages = data.get("messages", data.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise _MissingError("messages: is missing or no list")
    turns = tuple(_turn(message, index) for index, message in enumerate(messages))
    if not any(turn.role == "assistant" for turn in turns):
        raise _MissingError("messages: no assistant turn to learn from")
    return Row(turns=turns)


def _turn(message: Any, index: int) -> Turn:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise _MissingError(f"{where}: is no object")
    role = _ROLES.get(str(message.get("role", message.get("from"))))
    if role is None:
        raise _MissingError(f"{where}: role must be one of system, user, assistant")
    if role == "assistant" and index == 0:  # templates take no empty conversation, which would be its prompt
        raise _MissingError(f"{where}: the assistant speaks before anybody asked")
    try:
        return Turn(role, _text(message, "content" if "content" in message else "value"))
    except _MissingError as missing:
        raise _MissingError(f"{where}.{missing}") from None


_PARSERS = {"qa": _qa, "completion": _completion, "alpaca": _alpaca, "chat_template": _chat}
_EXPECTED = {
    "qa": 'a row of type qa looks like {"question": "...", "answer": "..."}',
    "completion": 'a row of type completion looks like {"text": "..."}',
    "alpaca": 'a row of type alpaca looks like {"instruction": "...", "input": "...", "output": "..."}',
    "chat_template": 'a row of type chat_template looks like {"messages": [{"role": "user", "content": "..."}, ...]}',
}
