"""Gradients are clipped to their common norm over all ranks, as torch clips those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.finetune.pipeline import Pipeline
from launch.recipe import FinetuneRecipe, parse_dump
from launch.shard.stage import Stage
from launch.split import Cut, whole
from tests import models
from tests.ranks import run_ranks


def _pipeline(folder: Path, cut: Cut) -> Pipeline:
    recipe = parse_dump(
        {
            "kind": "finetune",
            "name": "clip",
            "base_model": str(folder),
            "datasets": [{"path": "unused.jsonl", "type": "qa"}],
            "adapter": "full",
        }
    )
    assert isinstance(recipe, FinetuneRecipe)
    return Pipeline(Stage.load(folder, cut, dtype=torch.float32, device=torch.device("cpu")), recipe)


def _clipped(rank: int, folder: Path, cuts: list[Cut], max_norm: float) -> tuple[float, dict[str, float]]:
    """Clip gradients that are the weights themselves; returns the norm before, and each gradient's sum after."""
    strategy = _pipeline(folder, cuts[rank])
    for parameter in strategy.parameters():
        parameter.grad = parameter.detach().clone()
    norm = strategy.clip(max_norm)
    named: dict[str, Any] = dict(strategy.stage.model.named_parameters())
    return norm, {name: float(parameter.grad.double().sum()) for name, parameter in named.items()}


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0], ids=["clipped", "short enough", "never"])
def test_two_ranks_clip_as_torch_does_with_all_gradients(architecture: str, max_norm: float, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", architecture)
    reference = _pipeline(folder, whole(4)).stage.model
    for parameter in reference.parameters():
        parameter.grad = parameter.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm or float("inf"))
    expected = {name: float(parameter.grad.double().sum()) for name, parameter in reference.named_parameters()}
    assert float(norm) > 1
    split = run_ranks(_clipped, folder, [Cut(0, 2, 4), Cut(2, 4, 4)], max_norm)
    alone = _clipped(0, folder, [whole(4)], max_norm)
    for found, gradients in [*split, alone]:
        assert found == pytest.approx(float(norm), rel=1e-5)
        for name, gradient in gradients.items():
            assert gradient == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    assert {name for _, gradients in split for name in gradients} == set(expected)
