"""The ddp strategy: each rank keeps a whole model, and torch's DistributedDataParallel averages their gradients.

Not through accelerate: it finds its ranks in environment variables, and without them trains each rank alone, without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from launch.finetune import adapt
from launch.finetune.replicas import Replicas
from launch.recipe import FinetuneRecipe
from launch.shard.stage import Stage


class Ddp(Replicas):
    """This rank's copy of the model."""

    def __init__(self, stage: Stage, recipe: FinetuneRecipe, *, autocast: torch.dtype | None = None) -> None:
        self._stage = stage
        self._adapted: Any = None if recipe.adapter == "full" else adapt.add_lora(stage, recipe)
        inner = stage.model if self._adapted is None else self._adapted
        inner.train()
        if recipe.gradient_checkpointing:
            stage.model.activation_checkpointing_enable({"use_reentrant": False})
        model = DistributedDataParallel(inner)
        super().__init__(model, inner, recipe, stage.device, autocast)

    def save(self, *, adapter: Path, model: Path, tokenizer: Any) -> Path:
        """Rank 0 writes: all hold the same."""
        where = model if self._adapted is None else adapter
        if dist.get_rank() == 0:
            where.mkdir(exist_ok=True)
            (self._stage.model if self._adapted is None else self._adapted).save_pretrained(str(where))
            if self._adapted is None:
                tokenizer.save_pretrained(where)
        dist.barrier()
        return where

    def _synchronise(self, now: bool) -> None:
        self._model.require_backward_grad_sync = now
