"""What each type of row becomes, and how a wrong one is named."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import WrongInputError
from launch import rows
from launch.rows import Row, RowType, Turn


def _file(folder: Path, *lines: Any) -> Path:
    path = folder / "rows.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def _refusal(path: Path, row_type: RowType) -> WrongInputError:
    with pytest.raises(WrongInputError) as wrong:
        list(rows.read(path, row_type))
    assert wrong.value.fix
    return wrong.value


HELLO = (Turn("user", "Hello?"), Turn("assistant", "Hi."))


@pytest.mark.parametrize(
    ("row_type", "line", "row"),
    [
        ("qa", {"question": "Hello?", "answer": "Hi.", "other": 1}, Row(HELLO)),
        ("completion", {"text": "  Hello.\n"}, Row(text="  Hello.\n")),
        ("alpaca", {"instruction": "Hello?", "output": "Hi."}, Row(HELLO)),
        ("alpaca", {"instruction": "Hello?", "input": None, "output": "Hi."}, Row(HELLO)),
        ("alpaca", {"instruction": "Hello?", "input": "", "output": "Hi."}, Row(HELLO)),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            Row((Turn("user", "Add.\n\n1, 2"), Turn("assistant", "3"))),
        ),
        (
            "chat_template",
            {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]},
            Row(HELLO),
        ),
        (
            "chat_template",
            {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]},
            Row(HELLO),
        ),
        (
            "chat_template",
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hello?"},
                    {"role": "assistant", "content": "Hi."},
                    {"role": "user", "content": "Bye!"},
                ]
            },
            Row((Turn("system", "Be brief."), *HELLO, Turn("user", "Bye!"))),
        ),
    ],
)
def test_each_type_becomes_turns_or_text(tmp_path: Path, row_type: RowType, line: Any, row: Row) -> None:
    assert list(rows.read(_file(tmp_path, line), row_type)) == [row]


def test_rows_come_in_order_and_know_their_line(tmp_path: Path) -> None:
    path = _file(tmp_path, {"text": "one"}, b"", b"  \r", {"text": "four: é 😀"})
    read = list(rows.read(path, "completion"))
    assert [(row.text, row.where) for row in read] == [("one", f"{path}:1"), ("four: é 😀", f"{path}:4")]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as an editor on Windows leaves it
    assert list(rows.read(path, "completion")) == read


@pytest.mark.parametrize(
    ("row_type", "line", "message"),
    [
        ("qa", b"{'question': 1}", "no JSON (Expecting property name enclosed in double quotes)"),
        ("qa", b'{"question": "\xe9"}', "no JSON (not UTF-8)"),
        ("qa", b'{"question": ' + b"9" * 5000 + b"}", "no JSON (Exceeds the limit"),
        ("qa", b"[" * 100_000, "no JSON (maximum recursion depth"),
        ("qa", ["Hello?", "Hi."], "expected a JSON object, found list"),
        ("qa", {"question": "Hello?"}, "answer: is missing"),
        ("qa", {"question": None, "answer": "Hi."}, "question: is missing"),
        ("qa", {"question": "Hello?", "answer": "  "}, "answer: is empty"),
        ("qa", {"question": "Hello?", "answer": 42}, "answer: is no text (int)"),
        ("qa", b'{"question": "Hello?", "answer": "\\ud83d"}', "answer: holds half of a surrogate pair"),
        ("completion", {"txt": "Hello."}, "text: is missing"),
        ("completion", {"text": ""}, "text: is empty"),
        ("alpaca", {"instruction": "Add.", "input": [1, 2], "output": "3"}, "input: is no text (list)"),
        ("alpaca", {"instruction": "Add.", "response": "3"}, "output: is missing"),
        ("chat_template", {"message": []}, "messages: is missing or no list"),
        ("chat_template", {"messages": []}, "messages: is missing or no list"),
        ("chat_template", {"messages": {"role": "user"}}, "messages: is missing or no list"),
        ("chat_template", {"messages": ["Hello?"]}, "messages[0]: is no object"),
        ("chat_template", {"messages": [{"content": "Hello?"}]}, "messages[0]: role must be one of system, user,"),
        ("chat_template", {"messages": [{"role": ["user"], "content": "Hello?"}]}, "messages[0]: role must be one of"),
        (
            "chat_template",
            {"messages": [{"role": "user", "content": "Hello?"}, {"role": "tool", "content": "Hi."}]},
            "messages[1]: role must be one of system, user, assistant",
        ),
        ("chat_template", {"messages": [{"role": "user", "content": "Hello?"}]}, "messages: no assistant turn"),
        ("chat_template", {"messages": [{"role": "assistant", "content": "Hi."}]}, "messages[0]: the assistant speaks"),
        (
            "chat_template",
            {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": ""}]},
            "messages[1].content: is empty",
        ),
        (
            "chat_template",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}]},
            "messages[0].content: is no text (list)",
        ),
        ("chat_template", {"conversations": [{"from": "human"}]}, "messages[0].value: is missing"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row_type: RowType, line: Any, message: str) -> None:
    good = {
        "qa": {"question": "Hello?", "answer": "Hi."},
        "completion": {"text": "Hello."},
        "alpaca": {"instruction": "Hello?", "output": "Hi."},
        "chat_template": {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
    }
    path = _file(tmp_path, good[row_type], b"", line, good[row_type])
    wrong = _refusal(path, row_type)
    assert wrong.message.startswith(f"{path}:3: {message}")
    assert "\n" not in wrong.message
    if "no JSON" not in message:
        assert f"a row of type {row_type} looks like" in wrong.fix


def test_a_file_that_is_none_or_holds_nothing_is_named(tmp_path: Path) -> None:
    assert _refusal(tmp_path / "absent.jsonl", "qa").message == f"{tmp_path}/absent.jsonl: no such dataset file"
    assert "sparkctl dataset" in _refusal(tmp_path / "absent.jsonl", "qa").fix
    assert (
        _refusal(tmp_path, "qa").message
        == f"{tmp_path}: no data file lies in this folder (.jsonl, .json, .csv, .parquet)"
    )
    os.mkfifo(tmp_path / "pipe")
    assert "no such dataset file" in _refusal(tmp_path / "pipe", "qa").message
    assert "cannot be read (File name too long)" in _refusal(tmp_path / ("x" * 300), "qa").message
    assert _refusal(_file(tmp_path), "qa").message == f"{tmp_path}/rows.jsonl: the dataset is empty"
    assert "the dataset is empty" in _refusal(_file(tmp_path, b"", b"\t"), "qa").message


def _pairs(path: Path) -> list[Row]:
    return list(rows.read(path, "qa"))


def test_json_csv_and_parquet_hold_the_rows_that_json_lines_hold(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    data = [{"question": "Hello?", "answer": "Hi."}, {"question": "Two\nlines, or one?", "answer": 'He said "two".'}]
    expected = [Row((Turn("user", row["question"]), Turn("assistant", row["answer"]))) for row in data]
    (tmp_path / "a.json").write_text(json.dumps(data, indent=1))
    with (tmp_path / "b.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(data)
    parquet.write_table(pa.Table.from_pylist(data), tmp_path / "c.parquet")
    for name in ("a.json", "b.csv", "c.parquet"):
        assert _pairs(tmp_path / name) == expected
    (tmp_path / "notes.txt").write_text("no rows")
    assert _pairs(tmp_path) == expected * 3, "a folder is all its data files"


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.json", '[{"question": "a", "answer": "b"}, {"question": "a"}]', "a.json: row 2: answer: is missing"),
        ("a.json", '[{"question": ', "a.json:1: no JSON"),
        ("a.csv", "question,answer\na,b\nc,\n", "a.csv:3: answer: is empty"),
        ("a.csv", "question,answer\na\n", "a.csv:2: answer: is missing"),
        ("a.parquet", "text", "a.parquet: no Parquet"),
    ],
)
def test_a_bad_row_of_any_file_is_named(name: str, text: str, where: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert where in _refusal(tmp_path / name, "qa").message
