"""What a step is made of: every sample once an epoch, in the same order on every rank and on every run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import WrongInputError
from launch.chat import IGNORED, Sample
from launch.finetune import data
from launch.recipe import FinetuneRecipe
from tests import models

CPU = torch.device("cpu")
SAMPLES = [Sample((index, 1, 2), (IGNORED, 1, 2)) for index in range(10)]


def _recipe(*paths: Path, **changes: Any) -> FinetuneRecipe:
    settings: dict[str, Any] = {"kind": "finetune", "base_model": "unused", "sequence_len": 64, "seed": 3}
    datasets = tuple({"path": str(path), "type": "completion"} for path in paths)
    return FinetuneRecipe.model_validate({**settings, "datasets": datasets, **changes})


def _rows(path: Path, *lines: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _texts(path: Path, count: int) -> Path:
    return _rows(path, *({"text": f"row {index:03}"} for index in range(count)))


# collate


def test_a_micro_batch_is_padded_on_the_right_and_its_labels_are_shifted() -> None:
    batch = data.collate(
        iter([Sample((5, 6, 7), (IGNORED, 6, 7)), Sample(tuple(range(20, 31)), (IGNORED,) * 8 + (28, 29, 30))]),
        CPU,
        longest=64,
    )
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (2, 16)
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}
    assert batch.input_ids[0].tolist() == [5, 6, 7] + [0] * 13
    assert batch.labels[0].tolist() == [6, 7] + [IGNORED] * 14
    assert batch.labels[1].tolist() == [IGNORED] * 7 + [28, 29, 30] + [IGNORED] * 6
    assert batch.position_ids.tolist() == [list(range(16))] * 2
    assert (batch.learned, batch.tokens) == (5, 14)
    assert batch.learned == int((batch.labels != IGNORED).sum())


def test_padding_never_exceeds_the_longest_sequence() -> None:
    sample = Sample(tuple(range(9)), tuple(range(9)))
    assert data.collate([sample], CPU, longest=64).input_ids.shape == (1, 16)
    assert data.collate([sample], CPU, longest=12).input_ids.shape == (1, 12)
    assert data.collate([sample], CPU, longest=9).input_ids.shape == (1, 9)
    eight = Sample(tuple(range(8)), tuple(range(8)))
    assert data.collate([eight], CPU, longest=64).input_ids.shape == (1, 8)


# steps


def _taken(total: int, **how: Any) -> list[list[list[int]]]:
    settings = {"rows_each": 2, "micro_batches": 2, "seed": 3, **how}
    return [
        [[sample.ids[0] for sample in chunk] for chunk in step] for step in data.steps(SAMPLES, total=total, **settings)
    ]


def test_every_sample_is_taken_once_an_epoch() -> None:
    assert data.steps_per_epoch(len(SAMPLES), 4) == 3
    steps = _taken(6)
    assert [[len(chunk) for chunk in step] for step in steps] == [[2, 2], [2, 2], [2]] * 2
    for epoch in (steps[:3], steps[3:]):
        assert sorted(index for step in epoch for chunk in step for index in chunk) == list(range(10))


def test_each_epoch_has_an_order_of_its_own_and_each_call_the_same() -> None:
    steps = _taken(9)
    assert steps == _taken(9)
    assert len({str(steps[start : start + 3]) for start in (0, 3, 6)}) == 3
    assert steps[:3] != _taken(3, seed=4)
    assert _taken(9)[:5] == _taken(5), "how many steps are asked for changes nothing about the first ones"


def test_steps_end_when_asked_to_and_not_with_an_epoch() -> None:
    assert [len(_taken(total)) for total in (1, 2, 3, 4, 7)] == [1, 2, 3, 4, 7]


def test_a_step_may_be_larger_than_the_whole_data() -> None:
    steps = _taken(2, micro_batches=50)
    assert [sum(map(len, step)) for step in steps] == [10, 10]
    assert data.steps_per_epoch(len(SAMPLES), 100) == 1


def test_micro_batches_keep_their_order() -> None:
    assert data.chunks(SAMPLES[:5], 2) == [SAMPLES[0:2], SAMPLES[2:4], SAMPLES[4:5]]


# load


@pytest.mark.parametrize(("size", "held_out"), [(0, 0), (0.25, 5), (0.26, 5), (0.01, 0), (1, 1), (7, 7), (19, 19)])
def test_the_rows_asked_for_are_held_out_and_no_sample_is_lost(tmp_path: Path, size: float, held_out: int) -> None:
    corpus = data.load(_recipe(_texts(tmp_path / "a.jsonl", 20), val_set_size=size), models.tokenizer())
    assert (len(corpus.train), len(corpus.validation)) == (20 - held_out, held_out)
    assert len({*corpus.train, *corpus.validation}) == 20
    assert (corpus.counts.shortened, corpus.counts.dropped) == (0, 0)


def test_the_seed_decides_what_is_held_out(tmp_path: Path) -> None:
    recipe = _recipe(_texts(tmp_path / "a.jsonl", 20), val_set_size=5)
    held_out = list(data.load(recipe, models.tokenizer()).validation)
    assert list(data.load(recipe, models.tokenizer()).validation) == held_out
    other = _recipe(tmp_path / "a.jsonl", val_set_size=5, seed=4)
    assert list(data.load(other, models.tokenizer()).validation) != held_out


def test_several_datasets_are_mixed(tmp_path: Path) -> None:
    recipe = _recipe(_texts(tmp_path / "a.jsonl", 3), _rows(tmp_path / "b.jsonl", {"text": "b"}, {"text": "c"}))
    tokenizer = models.tokenizer()
    texts = Counter(tokenizer.decode(sample.ids) for sample in data.load(recipe, tokenizer).train)
    assert texts == Counter([*(f"row 00{index}<end>" for index in range(3)), "b<end>", "c<end>"])


def test_weights_say_how_often_rows_are_learned_and_none_that_is_held_out_is(tmp_path: Path) -> None:
    _texts(tmp_path / "a.jsonl", 8)
    _rows(tmp_path / "b.jsonl", *({"text": f"other {index}"} for index in range(8)))
    weights = {"a.jsonl": 2.5, "b.jsonl": 0.25}
    datasets = tuple(
        {"path": str(tmp_path / name), "type": "completion", "weight": weight} for name, weight in weights.items()
    )
    recipe, tokenizer = _recipe(datasets=datasets, val_set_size=4), models.tokenizer()
    corpus = data.load(recipe, tokenizer)
    seen = Counter(tokenizer.decode(sample.ids) for sample in corpus.train)
    held_out = {tokenizer.decode(sample.ids) for sample in corpus.validation}
    assert len(held_out) == 4
    assert not held_out & seen.keys()
    left = 8 - sum(text.startswith("row") for text in held_out)
    times = [count for text, count in seen.items() if text.startswith("row")]
    assert sorted(times) == [2] * (left - round(left / 2)) + [3] * round(left / 2)
    others = [count for text, count in seen.items() if text.startswith("other")]
    assert others == [1] * round((12 - left) / 4)
    assert list(data.load(recipe, tokenizer).train) == list(corpus.train)


def test_weights_that_leave_nothing_are_told(tmp_path: Path) -> None:
    datasets = ({"path": str(_texts(tmp_path / "a.jsonl", 3)), "type": "completion", "weight": 0.1},)
    with pytest.raises(WrongInputError, match="weights leave no sample"):
        data.load(_recipe(datasets=datasets), models.tokenizer())


def test_bad_rows_are_skipped_and_counted_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nnot JSON\n{"txt": "bad"}\n[]\n{"text": "two"}\n')
    corpus = data.load(_recipe(path, skip_bad_rows=True), models.tokenizer())
    assert len(corpus.train) == 2
    assert corpus.counts.bad == 3
    assert corpus.counts.first_bad.startswith(f"{path}:2: no JSON")
    path.write_text("not JSON\n")
    with pytest.raises(WrongInputError, match=r"1 bad, the first .*a\.jsonl:1"):
        data.load(_recipe(path, skip_bad_rows=True), models.tokenizer())


def test_long_samples_are_shortened_and_those_with_nothing_left_to_learn_dropped(tmp_path: Path) -> None:
    path = _rows(
        tmp_path / "a.jsonl",
        {"question": "?", "answer": "fits"},
        {"question": "?", "answer": "long " * 20},
        {"question": "long " * 20, "answer": "out of sight"},
    )
    recipe = _recipe(sequence_len=40, datasets=({"path": str(path), "type": "qa"},))
    corpus = data.load(recipe, models.tokenizer())
    assert (len(corpus.train), corpus.counts.shortened, corpus.counts.dropped) == (2, 2, 1)
    assert sorted(len(sample.ids) for sample in corpus.train) == [len("Question: ?\nAnswer: fits") + 1, 40]
    assert all(len(sample.ids) == len(sample.labels) and sample.learned for sample in corpus.train)


def test_no_sample_left_to_train_on_is_told_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(WrongInputError, match="3 usable, 3 held out, 0 with nothing to learn"):
        data.load(_recipe(_texts(tmp_path / "a.jsonl", 3), val_set_size=3), models.tokenizer())
    path = _rows(tmp_path / "b.jsonl", {"question": "long " * 20, "answer": "out of sight"})
    with pytest.raises(WrongInputError, match="0 usable, 0 held out, 1 with nothing to learn") as wrong:
        data.load(_recipe(datasets=({"path": str(path), "type": "qa"},), sequence_len=16), models.tokenizer())
    assert "sequence_len" in wrong.value.fix


def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = _rows(tmp_path / "a.jsonl", {"text": "good"}, {"txt": "bad"})
    with pytest.raises(WrongInputError, match=r"a\.jsonl:2: text: is missing"):
        data.load(_recipe(path), models.tokenizer())


def test_two_processes_take_the_same_steps_whatever_their_hash_seed(tmp_path: Path) -> None:
    path = _texts(tmp_path / "a.jsonl", 20)
    code = f"from tests.launch.finetune.test_data import *; print(digest(Path({str(path)!r})))"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == digest(path)


def digest(path: Path) -> str:
    """All that is trained on and held out, in order."""
    corpus = data.load(_recipe(path, val_set_size=0.2), models.tokenizer())
    steps = islice(data.steps(corpus.train, rows_each=2, micro_batches=3, seed=3, total=9), 9)
    return hashlib.sha256(repr((list(steps), list(corpus.validation))).encode()).hexdigest()
