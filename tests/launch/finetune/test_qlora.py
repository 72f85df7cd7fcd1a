"""Two ranks that hold a model in 4 bits, fused experts too, learn what one process learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import model_card
from launch.agent.report import Reporter
from launch.finetune import loop
from launch.finetune.data import Corpus
from launch.finetune.pipeline import Pipeline
from launch.recipe import FinetuneRecipe
from launch.shard.stage import Stage
from launch.split import balance
from tests import models
from tests.launch.finetune.test_pipeline import recipe, uneven_samples
from tests.ranks import run_ranks


def _train(rank: int, world: int, wanted: FinetuneRecipe) -> list[float]:
    folder = Path(wanted.base_model)
    cuts = balance(model_card.read(folder).layer_bytes, stages=world)
    stage = Stage.load(folder, cuts[rank], dtype=torch.float32, device=torch.device("cpu"), quantization="nf4")
    assert stage.model.is_loaded_in_4bit
    tallies = loop.train(Pipeline(stage, wanted), wanted, Corpus(tuple(uneven_samples()), ()), None, Reporter())
    return [tally.loss for tally in tallies]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_ranks_learn_in_four_bits_as_one_does(architecture: str, checkpointing: bool, tmp_path: Path) -> None:
    base = models.make(tmp_path / "base", architecture)
    wanted = recipe(base, adapter="qlora", max_steps=8, gradient_checkpointing=checkpointing)
    ours, alone = run_ranks(_train, 2, wanted)[0], run_ranks(_train, 1, wanted, world=1)[0]
    assert ours == pytest.approx(alone, abs=1e-4)
    assert ours[-1] < ours[0]
