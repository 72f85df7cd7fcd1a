"""Samples that share a row learn what they would have learned alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.errors import RefusedError
from launch.chat import IGNORED, Sample
from launch.finetune import data, packing
from launch.finetune.pipeline import Pipeline
from launch.shard.stage import Stage
from launch.split import Cut, whole
from tests import models
from tests.launch.finetune.test_pipeline import CPU, recipe, uneven_samples


def test_every_sample_is_in_one_row_and_no_row_is_too_long() -> None:
    lengths = [(index * 7) % 30 + 1 for index in range(200)]
    rows = packing.pack(lengths, range(200), 32)
    assert sorted(index for row in rows for index in row) == list(range(200))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= 32
    assert sum(filled) / len(filled) > 28, "rows are well filled"


def test_a_row_begins_its_positions_anew_and_learns_no_beginning() -> None:
    row = packing.join([Sample((1, 2, 3), (1, 2, 3)), Sample((4, 5), (IGNORED, 5))])
    assert row == Sample((1, 2, 3, 4, 5), (IGNORED, 2, 3, IGNORED, 5), (0, 1, 2, 0, 1))
    assert row.learned == 3
    batch = data.collate([row, Sample((7,) * 9, (7,) * 9)], CPU, longest=64)
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, *range(11)]
    assert batch.position_ids[1].tolist() == list(range(16))


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
def test_packed_rows_have_the_loss_and_the_gradients_of_their_samples(architecture: str, tmp_path: Path) -> None:
    wanted = recipe(models.make(tmp_path / "base", architecture))
    samples = uneven_samples()
    rows = data.packed(samples, [len(sample.ids) for sample in samples], seed=3, longest=64)
    assert len(rows) < len(uneven_samples()) * 0.8
    found = []
    for samples in (uneven_samples(), rows):
        strategy = Pipeline(Stage.load(tmp_path / "base", whole(4), dtype=torch.float32, device=CPU), wanted)
        tally = strategy.step([data.collate(chunk, CPU, longest=64) for chunk in data.chunks(samples, 2)])
        found.append((tally.loss, [parameter.grad for parameter in strategy.parameters()]))
    (loss, gradients), (packed_loss, packed_gradients) = found
    assert packed_loss == pytest.approx(loss, abs=1e-6)
    for one, other in zip(gradients, packed_gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("cut", [whole(4), Cut(0, 2, 4), Cut(2, 4, 4)], ids=str)
def test_attention_is_found_to_keep_samples_apart(cut: Cut, tmp_path: Path) -> None:
    packing.check(Stage.load(models.make(tmp_path), cut, dtype=torch.float32, device=CPU), "mine")


def test_a_model_whose_samples_would_see_each_other_is_refused_by_name(tmp_path: Path) -> None:
    stage = Stage.load(models.make(tmp_path), whole(4), dtype=torch.float32, device=CPU)
    stage.decoder.layers[1].register_forward_hook(lambda _module, _given, out: out + out.cumsum(1))
    with pytest.raises(RefusedError, match=r"mine: `sample_packing`: .*LlamaForCausalLM"):
        packing.check(stage, "mine")
