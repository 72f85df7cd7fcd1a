"""What the loop asks of a strategy: to step, to clip and update, to save and to load. How the model is spread is its own affair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional

from launch.chat import IGNORED
from launch.finetune.data import MicroBatch


@dataclass(frozen=True)
class Tally:
    """What one step, or one evaluation, came to over all its learned tokens; the same on every rank."""

    loss: float
    accuracy: float


class Strategy(Protocol):
    """A way to spread the model over the ranks. Every rank calls every method, in the same order, with the same batch."""

    device: torch.device

    def step(self, batch: Sequence[MicroBatch]) -> Tally:
        """Forward and backward over all micro-batches; the gradients are those of the mean loss over the batch's learned tokens."""

    def evaluate(self, batch: Sequence[MicroBatch]) -> Tally:
        """Loss and accuracy without learning."""

    def update(self, rate: float, max_norm: float) -> float:
        """Clip the gradients to a common norm (0: leave them) and take the optimizer's step; returns the norm before."""

    def state(self) -> dict[str, torch.Tensor]:
        """What this rank must have back to go on: trained weights and the optimizer's state, as they lie in its memory."""

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""

    def save(self, *, adapter: Path, model: Path, tokenizer: Any) -> Path:
        """Write the result: an adapter folder, or with full training a model folder; returns which."""


def token_loss(logits: torch.Tensor, labels: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """The summed loss of a micro-batch; loss and right guesses are added to `sums`, float64 [2].

    Shapes: logits [rows, tokens, vocabulary], labels [rows, tokens], already shifted.
    """
    logits, labels = logits.float().flatten(0, 1), labels.flatten()
    loss = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    sums[0] += loss.detach().double().cpu()
    sums[1] += (logits.detach().argmax(-1) == labels).sum().cpu()
    return loss
