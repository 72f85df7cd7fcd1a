"""`sparkctl dataset`: what it writes, what it says, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cluster.errors import RefusedError
from sparkctl.cli import main
from sparkctl.dataset import dataset

SOURCE = '''
"""Words and what they mean."""

def look_up(word, language="en"):
    """Find a word in the book. This takes a while."""

def close():
    ...
'''


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.py").write_text(SOURCE)
    return tmp_path


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(dataset, arguments)


def test_pairs_are_written_and_counted(book: Path) -> None:
    result = _run("book.py", "-o", "qa.jsonl")
    assert result.exit_code == 0
    assert result.output == "wrote 4 pairs to qa.jsonl (from 1 file; skipped 1 without a docstring)\n"
    assert [json.loads(line) for line in (book / "qa.jsonl").read_text().splitlines()] == [
        {"question": "What is the book module for?", "answer": "Words and what they mean."},
        {"question": "What does book.look_up do?", "answer": "Find a word in the book. This takes a while."},
        {"question": "What is the signature of book.look_up?", "answer": "book.look_up(word, language='en')"},
        {"question": "How do I call book.look_up?", "answer": "Call book.look_up(word); optional: language='en'."},
    ]


def test_completions_are_name_and_meaning(book: Path) -> None:
    assert _run("book.py", "-o", "c.jsonl", "--format", "completion", "-q").output == ""
    assert [json.loads(line)["text"] for line in (book / "c.jsonl").read_text().splitlines()] == [
        "book: Words and what they mean.",
        "book.look_up: Find a word in the book. This takes a while.",
    ]


def test_a_selection_says_that_it_is_one(book: Path) -> None:
    result = _run("book.py", "-o", "qa.jsonl", "--kinds", "meaning,call", "--max-answer", "30", "--max", "1")
    assert result.output == (
        "wrote 1 of 2 pairs, evenly spaced, to qa.jsonl "
        "(from 1 file; skipped 1 without a docstring, 1 with too long an answer)\n"
    )
    assert len((book / "qa.jsonl").read_text().splitlines()) == 1


def test_json_is_one_document_that_names_what_was_not_read(book: Path) -> None:
    (book / "library").mkdir()
    (book / "book.py").rename(book / "library" / "book.py")
    (book / "library" / "torn.py").write_text("def f(:\n")
    told = json.loads(_run("library", "-o", "qa.jsonl", "--json", "--max", "2").output)
    assert told.pop("unread") == [
        {
            "path": str(book.resolve() / "library" / "torn.py"),
            "reason": "unreadable",
            "detail": "line 1: invalid syntax",
        }
    ]
    assert told.pop("skipped") == {
        "without_docstring": 1, "too_short": 0, "uninformative": 0, "duplicate": 0, "answer_too_long": 0
    }  # fmt: skip
    assert told == {"file": "qa.jsonl", "format": "qa", "written": 2, "available": 4, "files": 1}


def test_an_existing_file_is_kept_unless_forced(book: Path) -> None:
    (book / "qa.jsonl").write_text("precious\n")
    refused = _run("book.py", "-o", "qa.jsonl")
    assert isinstance(refused.exception, RefusedError)
    assert (refused.exception.status, refused.exception.fix) == (3, "give another name, or --force to replace it")
    assert (book / "qa.jsonl").read_text() == "precious\n"
    assert _run("book.py", "-o", "qa.jsonl", "--force").exit_code == 0
    assert len((book / "qa.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bok", "-o", "qa.jsonl"), "bok: there is no such folder, file or installed package"),
        (("nowhere/at/all", "-o", "qa.jsonl"), "nowhere/at/all: there is no such file or folder"),
        (("book.py", "-o", "no/such/folder/qa.jsonl"), "there is no folder no/such/folder"),
        (("book.py", "-o", "qa.jsonl", "--max-answer", "3"), "no answer fits 3 characters"),
        (("book.py",), "Missing option '-o'"),
        (("book.py", "-o", "qa.jsonl", "--kinds", "meaning,rumour"), "'rumour' is none of meaning, signature, call"),
        (("book.py", "-o", "qa.jsonl", "--max", "0"), "0 is not in the range"),
        (("book.py", "-o", "qa.jsonl", "--format", "completion", "--kinds", "call"), "--kinds goes with --format qa"),
    ],
)
def test_a_wrong_input_is_told_in_two_lines_with_status_2_and_makes_nothing(
    book: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    before = sorted(book.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["dataset", *arguments])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert message in told.err
    assert len(told.err.splitlines()) <= 2
    assert told.out == ""
    assert sorted(book.rglob("*")) == before


def test_the_verb_loads_nothing_heavy_until_it_runs() -> None:
    script = (
        "import sys, sparkctl.dataset; print({'launch.docstrings', 'rich', 'torch', 'pydantic'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"
