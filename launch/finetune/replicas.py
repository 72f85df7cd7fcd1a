"""Strategies in which every rank runs the whole model on its share of the micro-batches: what ddp and fsdp2 have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launch.agent.report import pulse
from launch.chat import IGNORED
from launch.finetune.data import MicroBatch
from launch.finetune.optimizers import Trained
from launch.finetune.strategy import Tally, token_loss
from launch.recipe import FinetuneRecipe


class Replicas(ABC):
    """A model that averages the gradients of all ranks by itself, on the last micro-batch of a step.

    Args:
        model: as it is called; its forward takes transformers' arguments.
        inner: the same model under its own parameters' names.
    """

    def __init__(
        self, model: Any, inner: nn.Module, recipe: FinetuneRecipe, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        self.device = device
        self._model, self._inner, self._autocast = model, inner, autocast
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._trained = Trained(inner.named_parameters(), recipe)

    def step(self, batch: Sequence[MicroBatch]) -> Tally:
        """Each rank takes its share forward and backward; see Strategy.step."""
        learned = sum(micro_batch.learned for micro_batch in batch)
        sums = torch.zeros(2, dtype=torch.float64)
        share = self._share(batch)
        for index, micro_batch in enumerate(share):
            self._synchronise(index == len(share) - 1)
            # Gradients are averaged over the ranks, and the loss is a sum over all of them.
            torch.autograd.backward(self._loss(micro_batch, sums) * (self._world / learned))
            pulse()
        return self._tally(sums, learned)

    @torch.no_grad()
    def evaluate(self, batch: Sequence[MicroBatch]) -> Tally:
        """Loss and accuracy without learning."""
        learned = sum(micro_batch.learned for micro_batch in batch)
        sums = torch.zeros(2, dtype=torch.float64)
        self._model.eval()
        for micro_batch in self._share(batch):
            self._loss(micro_batch, sums)
            pulse()
        self._model.train()
        return self._tally(sums, learned)

    def update(self, rate: float, max_norm: float) -> float:
        """Clip to a common norm and take the optimizer's step; returns the norm before."""
        norm: Any = nn.utils.clip_grad_norm_(list(self._trained.named.values()), max_norm if max_norm > 0 else math.inf)
        self._trained.update(rate)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def state(self) -> dict[str, torch.Tensor]:
        """Trained weights and their optimizer's state, as this rank holds them."""
        return self._trained.state()

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave.

        Raises:
            WrongInputError: they are another recipe's.
        """
        self._trained.load_state(tensors)

    def _share(self, batch: Sequence[MicroBatch]) -> list[MicroBatch]:
        """This rank's micro-batches: as many as every other's, for they meet in each; one with nothing to learn fills up."""
        own = list(batch[self._rank :: self._world])
        if len(own) < math.ceil(len(batch) / self._world):
            last = batch[-1]
            own.append(replace(last, labels=torch.full_like(last.labels, IGNORED), learned=0, tokens=0))
        return own

    def _loss(self, micro_batch: MicroBatch, sums: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self._autocast or torch.bfloat16, enabled=self._autocast is not None):
            logits = self._model(
                input_ids=micro_batch.input_ids, position_ids=micro_batch.position_ids, use_cache=False
            ).logits
        return token_loss(logits, micro_batch.labels, sums)

    def _tally(self, sums: torch.Tensor, learned: int) -> Tally:
        dist.all_reduce(sums)
        return Tally(loss=float(sums[0]) / learned, accuracy=float(sums[1]) / learned)

    @abstractmethod
    def _synchronise(self, now: bool) -> None:
        """Whether the ranks average their gradients in the next backward pass."""
