"""What is asked about Python sources, what is left out, and how it is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import FailedError, RefusedError, WrongInputError
from launch import docstrings
from launch.docstrings import collect, lines, pairs, write
from tests.launch.garden import GARDEN, lay


@pytest.fixture
def garden(tmp_path: Path) -> Path:
    return lay(tmp_path / "garden", GARDEN)


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
    there = lay(tmp_path / "there" / "garden", GARDEN)
    back = lay(tmp_path / "back" / "garden", dict(reversed(GARDEN.items())))  # laid down in another order
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
