"""Recipes and boxes to plan with, and the public models of configs/."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from cluster.inventory import Node
from launch import box, model_card, model_config
from launch.box import GIB, Box
from launch.model_card import ModelCard
from launch.recipe import FinetuneRecipe, InferenceRecipe, parse_dump

CONFIGS = Path(__file__).parent / "configs"
NODES = (Node(name="spark-a", host="192.0.2.1"), Node(name="spark-b", host="192.0.2.2"))
SPARKS = box.of(NODES, {})


@cache
def public(name: str) -> ModelCard:
    """The card of a public model, from its config.json alone."""
    return model_card.of_config(model_config.parse((CONFIGS / f"{name}.json").read_text(), f"{name}/config.json"), name)


def serve(**changes: Any) -> InferenceRecipe:
    """Serve one sequence of 2048 tokens in NF4."""
    data = {"kind": "inference", "name": "serve", "base_model": "/models/m", "quantization": "nf4"}
    made = parse_dump({**data, "max_model_len": 2048, "max_num_seqs": 1, **changes})
    assert isinstance(made, InferenceRecipe)
    return made


def tune(**changes: Any) -> FinetuneRecipe:
    """QLoRA in a pipeline, on samples of 512 tokens."""
    data = {"kind": "finetune", "name": "tune", "base_model": "/models/m", "adapter": "qlora", "sequence_len": 512}
    data["strategy"] = "pipeline"
    made = parse_dump({**data, "datasets": [{"path": "a.jsonl", "type": "qa"}], **changes})
    assert isinstance(made, FinetuneRecipe)
    return made


def cpus(gib: float = 64, ranks: int = 2) -> tuple[Box, ...]:
    """Ranks without a GPU, each on a box of its own."""
    return tuple(Box(f"cpu-{rank}", int(gib * GIB), None, False, None, "a test's") for rank in range(ranks))
