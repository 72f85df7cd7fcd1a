"""Which Python sources are found and read, and what is said of the others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cluster.errors import WrongInputError
from launch import sources
from launch.docstrings import collect
from tests.launch.garden import GARDEN, lay


def test_files_that_cannot_be_read_are_reported_and_the_others_still_count(tmp_path: Path) -> None:
    garden = lay(tmp_path / "garden", GARDEN)
    (garden / "broken.py").write_text("def f(:\n")
    (garden / "undecodable.py").write_bytes(b'"""A word: \xe9."""\n')
    (garden / "nulls.py").write_bytes(b"x = 1\0\n")
    (garden / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000 + "\n")
    (garden / "huge.py").write_text("# " + "x" * sources.MAX_SOURCE)
    (garden / "itself.py").symlink_to("itself.py")
    (garden / "again").symlink_to(garden)
    (garden / "no-name.py").write_text('"""Cannot be imported so."""')
    os.mkfifo(garden / "pipe.py")
    lay(garden / "tests", {"test_it.py": '"""Tests say nothing to a user."""\n'})
    lay(garden / ".hidden", {"x.py": '"""Not looked at, nor counted."""\n'})
    lay(garden / "env", {"pyvenv.cfg": "", "lib/x.py": '"""Somebody else wrote this."""\n'})
    (garden / "latin.py").write_bytes('# -*- coding: latin-1 -*-\n"""Où poussent les fleurs."""\n'.encode("latin-1"))

    harvest = collect(str(garden))

    unread = {Path(u.path).name: (u.reason, u.detail) for u in harvest.unread}
    assert unread.pop("again") == ("linked folder", "")
    assert unread.pop("tests") == ("test folder", "")
    assert unread.pop("no-name.py") == ("not importable", "")
    assert unread.pop("broken.py") == ("unreadable", "line 1: invalid syntax")
    assert unread.pop("pipe.py") == ("unreadable", "no regular file")
    assert "2,097,154 bytes" in unread.pop("huge.py")[1]
    assert sorted(unread) == ["deep.py", "itself.py", "nulls.py", "undecodable.py"]
    assert {reason for reason, _ in unread.values()} == {"unreadable"}
    assert harvest.files == len(GARDEN) + 1
    assert "Où poussent les fleurs." in {item.text for item in harvest.items}


def test_nothing_that_is_read_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "ran"
    body = f'"""Leaves a mark when it runs."""\nopen({str(mark)!r}, "w")\n'
    lay(
        tmp_path / "marks",
        {"__init__.py": body, "inner/__init__.py": body.replace("Leaves", "Makes"), "inner/leaf.py": body},
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert len(collect("marks").items) == 2
    assert [item.name for item in collect("marks.inner.leaf").items] == ["marks.inner.leaf"]
    assert not mark.exists()
    assert "marks" not in sys.modules


def test_a_source_is_a_folder_a_file_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"a.py": '"""What the first one says."""', "b.py": '"""What the second one says."""'}

    def names(source: Path | str) -> list[str]:
        return [item.name for item in collect(str(source)).items]

    package = lay(
        tmp_path / "project" / "src" / "tree", {"__init__.py": "", "inner/__init__.py": "", "inner/a.py": said["a.py"]}
    )
    assert names(tmp_path / "project") == names(package) == names(package / "inner" / "a.py") == ["tree.inner.a"]
    lay(tmp_path / "project", {"src/loose.py": said["b.py"], "my-scripts/job.py": '"""Runs once every night."""'})
    assert names(tmp_path / "project") == ["job", "loose", "tree.inner.a"]
    monkeypatch.syspath_prepend(tmp_path / "project" / "src")
    monkeypatch.syspath_prepend(lay(tmp_path / "one", {"spread/part/a.py": said["a.py"]}))
    monkeypatch.syspath_prepend(lay(tmp_path / "two", {"spread/b.py": said["b.py"]}))
    assert names("tree.inner") == ["tree.inner.a"]
    assert names("loose") == ["loose"]
    assert names("spread") == ["spread.b", "spread.part.a"]  # a namespace package, in two places
    assert names("spread.part.a") == ["spread.part.a"]


@pytest.mark.parametrize(
    ("source", "message", "fix"),
    [
        ("textwrp", "textwrp: there is no such folder, file or installed package", "did you mean textwrap?"),
        ("json.decodr", "json.decodr: there is no such folder, file", "did you mean json.decoder?"),
        ("no/such/folder", "no/such/folder: there is no such file or folder", "stdlib"),
        ("sys", "sys: there is no such folder, file or installed package", ""),
        ("empty", "empty: no Python file in it", "folder with .py files"),
        ("notes.txt", "notes.txt: is no Python source", ".py file"),
        ("silent", "silent: no docstring to learn from (2 without docstring, 1 too short)", "say what they do"),
        ("broken.py", "broken.py: no docstring to learn from (", ""),
    ],
)
def test_a_wrong_source_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str, fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, {"notes.txt": "", "broken.py": "def f(:\n", "silent/a.py": 'def f(): ...\ndef g():\n    "Short."\n'})
    (tmp_path / "empty").mkdir()
    with pytest.raises(WrongInputError) as wrong:
        collect(source)
    assert wrong.value.message.startswith(message)
    assert fix in wrong.value.fix
