"""Datasets are tokenised once: a second run maps what the first has made, and nothing that is out of date or damaged is used."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.chat import IGNORED, Sample
from launch.finetune import cache, data
from launch.finetune.cache import Counts
from launch.recipe import Dataset, FinetuneRecipe
from tests import models

SAMPLES = [Sample((index, 2, 3), (IGNORED, 2, 3)) for index in range(5)]


class Deaf:
    """A tokenizer that must not be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"tokenised again: {name}")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    models.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{n}", "answer": f"a{n}"}) + "\n" for n in range(6)))
    return path


def recipe(base: Path, rows: Path, **changes: Any) -> FinetuneRecipe:
    given = {"kind": "finetune", "base_model": str(base), "datasets": ({"path": str(rows), "type": "qa"},)}
    return FinetuneRecipe.model_validate({**given, "sequence_len": 64, **changes})


def made(count: int = 5) -> cache.Tokens:
    return cache.gather(SAMPLES[:count], lambda: Counts(1, 2, 3, "the first"))


def sets(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    tokens, there = cache.get(tmp_path / "tokens", "key", made)
    assert not there
    assert list(tokens) == SAMPLES
    assert tokens[1:3] == SAMPLES[1:3]
    assert tokens[-1] == SAMPLES[-1]
    assert tokens.lengths == [3] * 5
    assert tokens.counts == Counts(1, 2, 3, "the first")
    with pytest.raises(IndexError):
        tokens[5]


def test_a_dataset_without_a_single_sample_is_kept_too(tmp_path: Path) -> None:
    assert list(cache.get(tmp_path, "key", lambda: made(0))[0]) == []
    assert cache.get(tmp_path, "key", lambda: pytest.fail("made again"))[1]


def test_a_second_run_does_not_tokenise_and_maps_the_tokens(base: Path, rows: Path, tmp_path: Path) -> None:
    first = data.load(recipe(base, rows), models.tokenizer(), tmp_path / "tokens")
    second = data.load(recipe(base, rows), Deaf(), tmp_path / "tokens")
    assert (first.reused, second.reused) == (0, 1)
    assert list(second.train) == list(first.train)
    assert len(second.train) == 6
    mapped = cache.read(sets(tmp_path / "tokens")[0])
    assert mapped is not None
    assert isinstance(mapped.ids.base, np.memmap | mmap.mmap)
    assert not mapped.ids.flags.writeable


def test_seed_split_weights_and_packing_take_the_same_tokens(base: Path, rows: Path, tmp_path: Path) -> None:
    data.load(recipe(base, rows), models.tokenizer(), tmp_path / "tokens")
    again = recipe(base, rows, seed=7, val_set_size=2, sample_packing=True, micro_batch_size=4)
    packed = data.load(again, Deaf(), tmp_path / "tokens")
    assert packed.reused == 1
    assert packed.train[0].positions
    assert len(packed.validation) == 2


@pytest.mark.parametrize(
    "change", ["row", "type", "length", "template", "tokenizer", "skipping", "another file of a folder"]
)
def test_whatever_the_tokens_depend_on_makes_them_anew(change: str, base: Path, rows: Path) -> None:
    folder = rows.with_name("folder")
    folder.mkdir()
    shutil.copy(rows, folder / "a.jsonl")
    given: dict[str, Any] = {"base_model": base, "sequence_len": 64, "skip_bad_rows": False}
    dataset = Dataset(path=str(folder if "folder" in change else rows), type="qa")
    before = cache.key_of(dataset, **given)
    assert cache.key_of(dataset, **given) == before
    match change:
        case "row":
            rows.write_text(rows.read_text().replace("a3", "b3"))
        case "type":
            dataset = Dataset(path=str(rows), type="alpaca")
        case "length":
            given["sequence_len"] = 32
        case "template":
            (base / "chat_template.jinja").write_text("{{ messages }}")
        case "tokenizer":
            path = base / "tokenizer.json"
            path.write_text(path.read_text() + " ")
        case "skipping":
            given["skip_bad_rows"] = True
        case _:
            shutil.copy(rows, folder / "b.jsonl")
    assert cache.key_of(dataset, **given) != before


def test_the_same_rows_elsewhere_are_the_same_dataset(base: Path, rows: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"base_model": base, "sequence_len": 64, "skip_bad_rows": False}
    other = shutil.copy(rows, tmp_path / "copy.jsonl")
    assert cache.key_of(Dataset(path=str(other), type="qa"), **given) == cache.key_of(
        Dataset(path=str(rows), type="qa"), **given
    )


@pytest.mark.parametrize("damage", ["a bit", "cut short", "a file gone", "no facts", "facts of another kind"])
def test_a_damaged_set_is_made_anew(damage: str, tmp_path: Path) -> None:
    cache.get(tmp_path, "key", made)
    ids, about = tmp_path / "key" / "ids.npy", tmp_path / "key" / "about.json"
    match damage:
        case "a bit":
            content = bytearray(ids.read_bytes())
            content[-1] ^= 1
            ids.write_bytes(content)
        case "cut short":
            ids.write_bytes(ids.read_bytes()[:-4])
        case "a file gone":
            (tmp_path / "key" / "ends.npy").unlink()
        case "no facts":
            about.unlink()
        case _:
            about.write_text("[]")
    tokens, there = cache.get(tmp_path, "key", made)
    assert not there
    assert list(tokens) == SAMPLES
    assert cache.get(tmp_path, "key", lambda: pytest.fail("made again"))[1]


def test_what_was_cut_off_while_it_was_written_is_not_taken(tmp_path: Path) -> None:
    left = tmp_path / ".key.new"
    left.mkdir()
    (left / "ids.npy").write_bytes(b"half")
    tokens, there = cache.get(tmp_path, "key", made)
    assert not there
    assert list(tokens) == SAMPLES
    assert not left.exists()


def test_ranks_of_one_machine_tokenise_once_together(tmp_path: Path) -> None:
    asked: list[int] = []
    found: list[bool] = []

    def make() -> cache.Tokens:
        asked.append(1)
        return made()

    ranks = [
        threading.Thread(target=lambda: found.append(list(cache.get(tmp_path, "key", make)[0]) == SAMPLES))
        for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert (asked, found) == ([1], [True] * 4)


def test_the_sets_used_longest_ago_go_when_there_are_too_many(tmp_path: Path) -> None:
    for number, key in enumerate(("old", "older", "used")):
        cache.get(tmp_path, key, made)
        os.utime(tmp_path / key / "about.json", (1000 - number, 1000 - number))
    cache.get(tmp_path, "used", made)
    size = sum(file.stat().st_size for file in (tmp_path / "old").iterdir())
    tokens, _ = cache.get(tmp_path, "new", made, most=int(size * 2.5))
    assert {path.name for path in sets(tmp_path)} == {"used", "new"}
    assert list(tokens) == SAMPLES
    cache.get(tmp_path, "larger than all", made, most=1)
    assert {path.name for path in sets(tmp_path)} == {"larger than all"}


def test_a_folder_that_cannot_be_written_costs_no_more_than_the_time(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("in the way")
    tokens, there = cache.get(tmp_path / "tokens", "key", made)
    assert not there
    assert list(tokens) == SAMPLES
