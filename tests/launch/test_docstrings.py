"""What is read from Python sources, what is asked about it, and what is left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cluster.errors import FailedError, RefusedError, WrongInputError
from launch import docstrings
from launch.docstrings import collect, first_paragraph, lines, pairs, whole_sentences, write

GARDEN = {
    "__init__.py": '''
        """Grow things in rows and beds.

        More about it.
        """
        from ._soil import Bed, _Worm
        from .tools import *
        ''',
    "_soil.py": '''
        """Private, so named by nobody."""

        class Bed:
            """A raised bed with good soil."""

            def turn(self, depth):
                """Turn the soil to a depth."""

        class Clay:
            """Nobody passes this one on."""
        ''',
    "tools.py": '''
        """Tools that you hold in a hand."""
        __all__ = ["dig"]
        __all__ += ["rake"]

        def dig(place: str, depth: float = 0.5, /, *others: int, spade, quiet=False, **how) -> bool:
            """Dig a hole in `place`.

            :param place: not part of the answer
            """

        def rake(*, width=3):
            """Rake the leaves from the lawn. It takes all afternoon."""

        def sharpen(blade):
            """Sharpen a blade on the stone."""
        ''',
    "plants.py": '''
        """Plants, from seed to harvest."""
        from typing import overload

        class Plant:
            """Something green that grows."""

            def __init__(self, name, height=0.0):
                """Not the class's own docstring."""

            @property
            def height(self) -> float:
                """Height over ground, in metres."""

            @height.setter
            def height(self, value):
                """Set the height by hand, of all things."""

            def water(self, litres):
                """Give it some water."""

            async def bloom(self, colour="white"):
                """Wait until the flowers open."""

            @classmethod
            def from_seed(cls, seed):
                """Grow a plant from one seed."""

            @staticmethod
            def is_green(colour):
                """Tell whether a colour is green."""

            def __repr__(self):
                """Return what repr shows."""

            class Leaf:
                """The part that drinks light."""

                def fall(self):
                    """Drop to the ground in autumn."""

        @overload
        def graft(a: int):
            """One of several ways to graft."""
        def graft(a, b):
            """Join two plants into one."""

        def undocumented(): ...
        def todo():
            """TODO: say what this does"""
        def short():
            """Short."""
        def harvest_time():
            """The harvest time of this class."""
        def uproot():
            """Pull a plant out with its roots.

            This function is deprecated, let it stand.
            """
        def again(a, b):
            """Join two plants into one."""
        def _hidden():
            """Nobody should read about this."""

        if __name__ == "__main__":
            def main():
                """Run as a script and never imported."""
        ''',
}


def _lay(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    return folder


@pytest.fixture
def garden(tmp_path: Path) -> Path:
    return _lay(tmp_path / "garden", GARDEN)


def _answers(source: Path | str) -> dict[str, str]:
    return {pair.question: pair.answer for pair in pairs(collect(str(source)))}


def test_objects_are_named_as_a_user_writes_them(garden: Path) -> None:
    assert [item.name for item in collect(str(garden)).items] == [
        "garden",
        "garden.Bed",
        "garden.Bed.turn",
        "garden.dig",
        "garden.plants",
        "garden.plants.Plant",
        "garden.plants.Plant.Leaf",
        "garden.plants.Plant.Leaf.fall",
        "garden.plants.Plant.bloom",
        "garden.plants.Plant.from_seed",
        "garden.plants.Plant.height",
        "garden.plants.Plant.is_green",
        "garden.plants.Plant.water",
        "garden.plants.again",
        "garden.rake",
        "garden.tools",
    ]


def test_each_kind_of_object_is_asked_about_in_its_own_words(garden: Path) -> None:
    answers = _answers(garden)
    assert answers["What is the garden package for?"] == "Grow things in rows and beds."
    assert answers["What is the garden.tools module for?"] == "Tools that you hold in a hand."
    assert answers["What is garden.plants.Plant?"] == "Something green that grows."
    assert answers["What is garden.plants.Plant.height?"] == "Height over ground, in metres."
    assert answers["What does garden.dig do?"] == "Dig a hole in place."


def test_signatures_are_those_of_the_source_and_calls_those_of_a_caller(garden: Path) -> None:
    answers = _answers(garden)
    assert answers["What is the signature of garden.dig?"] == (
        "garden.dig(place: str, depth: float=0.5, /, *others: int, spade, quiet=False, **how) -> bool"
    )
    assert answers["How do I call garden.dig?"] == (
        "Call garden.dig(place, spade=...); optional: depth=0.5, *others, quiet=False, **how."
    )
    plant = "garden.plants.Plant"
    assert answers[f"What is the signature of {plant}?"] == f"{plant}(name, height=0.0)"
    assert answers[f"How do I call {plant}?"] == f"Call {plant}(name); optional: height=0.0."
    assert answers[f"What is the signature of {plant}.water?"] == f"{plant}.water(self, litres)"
    assert answers[f"How do I call {plant}.water?"] == f"Call water(litres) on the {plant} object."
    assert answers[f"What is the signature of {plant}.bloom?"] == f"async {plant}.bloom(self, colour='white')"
    assert answers[f"How do I call {plant}.bloom?"] == f"Await bloom() on the {plant} object; optional: colour='white'."
    assert answers[f"How do I call {plant}.from_seed?"] == f"Call {plant}.from_seed(seed)."
    assert answers[f"What is the signature of {plant}.is_green?"] == f"{plant}.is_green(colour)"
    assert f"How do I call {plant}.height?" not in answers


def test_what_teaches_nothing_is_counted_by_reason(garden: Path) -> None:
    skipped = collect(str(garden)).skipped
    # graft says word for word what again says; of the two the first by name stays
    assert skipped == docstrings.Skipped(without_docstring=1, too_short=1, uninformative=3, duplicate=1)


def test_files_that_cannot_be_read_are_reported_and_the_others_still_count(garden: Path) -> None:
    (garden / "broken.py").write_text("def f(:\n")
    (garden / "undecodable.py").write_bytes(b'"""A word: \xe9."""\n')
    (garden / "nulls.py").write_bytes(b"x = 1\0\n")
    (garden / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000 + "\n")
    (garden / "huge.py").write_text("# " + "x" * docstrings.MAX_SOURCE)
    (garden / "itself.py").symlink_to("itself.py")
    (garden / "again").symlink_to(garden)
    (garden / "no-name.py").write_text('"""Cannot be imported so."""')
    os.mkfifo(garden / "pipe.py")
    _lay(garden / "tests", {"test_it.py": '"""Tests say nothing to a user."""\n'})
    _lay(garden / ".hidden", {"x.py": '"""Not looked at, nor counted."""\n'})
    _lay(garden / "env", {"pyvenv.cfg": "", "lib/x.py": '"""Somebody else wrote this."""\n'})
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
    _lay(
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

    package = _lay(
        tmp_path / "project" / "src" / "tree", {"__init__.py": "", "inner/__init__.py": "", "inner/a.py": said["a.py"]}
    )
    assert names(tmp_path / "project") == names(package) == names(package / "inner" / "a.py") == ["tree.inner.a"]
    _lay(tmp_path / "project", {"src/loose.py": said["b.py"], "my-scripts/job.py": '"""Runs once every night."""'})
    assert names(tmp_path / "project") == ["job", "loose", "tree.inner.a"]
    monkeypatch.syspath_prepend(tmp_path / "project" / "src")
    monkeypatch.syspath_prepend(_lay(tmp_path / "one", {"spread/part/a.py": said["a.py"]}))
    monkeypatch.syspath_prepend(_lay(tmp_path / "two", {"spread/b.py": said["b.py"]}))
    assert names("tree.inner") == ["tree.inner.a"]
    assert names("loose") == ["loose"]
    assert names("spread") == ["spread.b", "spread.part.a"]  # a namespace package, in two places
    assert names("spread.part.a") == ["spread.part.a"]


@pytest.mark.parametrize(
    ("docstring", "said"),
    [
        ("Return it\n    in one line", "Return it in one line."),
        ("Title\n=====\n\nWhat it is for.\n\nMore.", "What it is for."),
        ("fold(x, n=(1, 2)) -> text\n\nFold the text.", "Fold the text."),
        ("x, y = fold(key)\nboth halves of the page", "Both halves of the page."),
        ("fold -- Fold the text.", "Fold the text."),
        ("fold(): Fold the text.", "Fold the text."),
        ("fold lines\nFold the lines given.", "Fold the lines given."),
        (">>> fold(1)\n2\n\nFold the number.", "Fold the number."),
        ("Fold it:\n\n>>> fold(1)", ""),
        ("Fold the text. It takes these:\n- a\n- b", "Fold the text."),
        ("Fold the text, for example::\n\n    fold(x)", "Fold the text."),
        ("Fold the text\n:param x: what", "Fold the text."),
        ("Fold the text.\nArgs:\n    x: what", "Fold the text."),
        ("Args:\n    x: what\n\nNot about it.", ""),
        ("Fold a :class:`~a.b.Page`, :func:`fold` or :ref:`more <label>` of ``x``.", "Fold a Page, fold or more of x."),
        ("Fold *text* as **one**, *args and **kw, `see <https://x.y>`_.", "Fold text as one, *args and **kw, see."),
        ("Fold L{Page} and [`Sheet`] of [it](http://x.y).", "Fold Page and [Sheet] of it."),
        ("Copyright (c) 2001 Somebody.\n\nFold the text.", "Fold the text."),
        ("pop(k) -> v, folds the value and\nreturns it.", ""),
        ("Half of a pair: \ud83d, dropped.", "Half of a pair: , dropped."),
        ("", ""),
    ],
)  # fmt: skip
def test_a_docstring_is_told_as_prose(docstring: str, said: str) -> None:
    assert first_paragraph(docstring, "paper.fold") == said


def test_answers_end_where_a_sentence_ends() -> None:
    text = "Fold it, e.g. once. Then (if you like.) Again, and v1.5 too! Done?"
    assert whole_sentences(text, 20) == "Fold it, e.g. once."
    assert whole_sentences(text, 45) == "Fold it, e.g. once. Then (if you like.)"
    assert whole_sentences(text, 60) == "Fold it, e.g. once. Then (if you like.) Again, and v1.5 too!"
    assert whole_sentences(text, 12) == ""
    assert whole_sentences(text, None) == text


def test_a_bound_on_answers_cuts_meanings_and_leaves_out_the_rest(garden: Path) -> None:
    short = pairs(collect(str(garden)), max_answer=40)
    assert all(len(pair.answer) <= 40 for pair in short)
    told = {pair.question: pair.answer for pair in short}
    assert told["What does garden.rake do?"] == "Rake the leaves from the lawn."
    assert "What is the signature of garden.dig?" not in told


def test_a_limit_keeps_every_module_and_every_kind(tmp_path: Path) -> None:
    for letter in "abc":
        functions = [f'def f{i}(x):\n    """Do what {letter} needs, step {i}."""\n' for i in range(7)]
        (tmp_path / f"{letter}.py").write_text("".join(functions))
    everything = pairs(collect(str(tmp_path)))
    some = pairs(collect(str(tmp_path)), limit=9)
    assert len(everything) == 63
    assert sorted((pair.name[0], pair.kind) for pair in some) == sorted(
        (m, kind) for m in "abc" for kind in docstrings.KINDS
    )
    assert [pair for pair in everything if pair in some] == some
    assert pairs(collect(str(tmp_path)), limit=10_000) == everything
    assert {pair.kind for pair in pairs(collect(str(tmp_path)), kinds=("call",))} == {"call"}


def test_lines_are_json_of_either_form(garden: Path) -> None:
    meanings = pairs(collect(str(garden)), kinds=("meaning",))
    assert json.loads(lines(meanings)[0]) == {
        "question": "What is the garden package for?",
        "answer": "Grow things in rows and beds.",
    }
    assert json.loads(lines(meanings, "completion")[0]) == {"text": "garden: Grow things in rows and beds."}


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import sys; from launch.docstrings import collect, lines, pairs\n"
        "sys.stdout.write('\\n'.join(lines(pairs(collect(sys.argv[1]), limit=30))))"
    )
    there = _lay(tmp_path / "there" / "garden", GARDEN)
    back = _lay(tmp_path / "back" / "garden", dict(reversed(GARDEN.items())))  # laid down in another order
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            check=True,
        ).stdout
        for folder, seed in ((there, "1"), (there, "2"), (back, "3"))
    }
    assert len(outputs) == 1
    assert outputs.pop().count(b"\n") == 29


def test_the_standard_library_gives_a_demonstration_its_pairs() -> None:
    harvest = collect("stdlib")
    answers = {pair.name: pair.answer for pair in pairs(harvest, kinds=("meaning",), max_answer=60)}
    assert len(answers) >= 500
    assert answers["shutil.rmtree"] == "Recursively delete a directory tree."
    assert answers["asyncio.wait"].startswith("Wait for the Futures")  # defined in asyncio.tasks
    assert not [name for name in answers if name.split(".")[0] in ("test", "idlelib", "lib2to3", "turtledemo", "pip")]
    assert not [name for name in answers if any(part.startswith("_") for part in name.split("."))]


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
    _lay(tmp_path, {"notes.txt": "", "broken.py": "def f(:\n", "silent/a.py": 'def f(): ...\ndef g():\n    "Short."\n'})
    (tmp_path / "empty").mkdir()
    with pytest.raises(WrongInputError) as wrong:
        collect(source)
    assert wrong.value.message.startswith(message)
    assert fix in wrong.value.fix


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "qa.jsonl"
    write(target, ["{}", "[]"])
    assert target.read_bytes() == b"{}\n[]\n"
    with pytest.raises(RefusedError):
        write(target, ["other"])
    write(target, ["other"], force=True)
    assert target.read_text() == "other\n"
    link = tmp_path / "link.jsonl"
    link.symlink_to(target)
    write(link, ["through"], force=True)
    assert (link.is_symlink(), target.read_text()) == (True, "through\n")
    with pytest.raises(FailedError, match="could not be written"):
        write(tmp_path / ("x" * 250), ["{}"])  # its name fits, that of the file beside it does not
    for wrong in (tmp_path, Path(os.devnull), tmp_path / "none" / "qa.jsonl"):
        with pytest.raises(WrongInputError):
            write(wrong, ["{}"], force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl", "qa.jsonl"]
