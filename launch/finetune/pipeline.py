"""The pipeline strategy: each rank keeps its layers, activations go forward and gradients come back over the link (1F1B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launch.finetune import adapt
from launch.finetune.data import MicroBatch
from launch.finetune.optimizers import Trained
from launch.finetune.schedule import Move, one_forward_one_backward
from launch.finetune.strategy import Tally, token_loss
from launch.finetune.vitals import Waiting
from launch.recipe import FinetuneRecipe
from launch.shard.handoff import Handoff
from launch.shard.stage import Stage


@dataclass
class _Passing:
    """One micro-batch between its forward and its backward pass."""

    received: torch.Tensor | None
    output: torch.Tensor


class Pipeline:
    """This rank's part of the strategy. A world of one is the same code without neighbours."""

    def __init__(self, stage: Stage, recipe: FinetuneRecipe, *, autocast: torch.dtype | None = None) -> None:
        self.stage = stage
        self.device = stage.device
        self.handoff = Handoff(stage.device, alone=stage.cut.whole)
        self.waiting = Waiting(stage.device)
        self._autocast = autocast
        self._adapted: Any = None if recipe.adapter == "full" else adapt.add_lora(stage, recipe)
        self._tie = self._tied_embedding()
        stage.model.train()
        if recipe.gradient_checkpointing:
            stage.model.activation_checkpointing_enable({"use_reentrant": False})
        self._trained = Trained(stage.model.named_parameters(), recipe)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained on this rank."""
        return list(self._trained.named.values())

    def step(self, batch: Sequence[MicroBatch]) -> Tally:
        """Forward and backward over all micro-batches; gradients are those of the mean loss over all learned tokens of `batch`.

        A mean of the micro-batches' means would weigh a token by how few others share its micro-batch.
        """
        learned = sum(micro_batch.learned for micro_batch in batch)
        sums = torch.zeros(2, dtype=torch.float64)
        passing: dict[int, _Passing] = {}
        for move, index in one_forward_one_backward(
            stage=self.handoff.rank, stages=self.handoff.world, micro_batches=len(batch)
        ):
            if move is Move.FORWARD:
                passing[index] = self._forward(batch[index], learned, sums)
            else:
                self._backward(passing.pop(index))
        self.handoff.flush()
        self._sum_tied_gradient()
        return self._tally(sums, learned)

    @torch.no_grad()
    def evaluate(self, batch: Sequence[MicroBatch]) -> Tally:
        """Loss and accuracy without learning."""
        learned = sum(micro_batch.learned for micro_batch in batch)
        sums = torch.zeros(2, dtype=torch.float64)
        self.stage.model.eval()
        for micro_batch in batch:
            self._forward(micro_batch, learned, sums)
        self.stage.model.train()
        self.handoff.flush()
        return self._tally(sums, learned)

    def clip(self, max_norm: float) -> float:
        """Scale all ranks' gradients so that their common norm is at most `max_norm` (0: leave them); returns the norm before."""
        square = torch.zeros(1, dtype=torch.float64)
        gradients = []
        for parameter in self.parameters():
            if parameter.grad is None:
                continue
            gradients.append(parameter.grad)
            counted_elsewhere = parameter is self._tie and not self.stage.cut.first
            if not counted_elsewhere:
                square += parameter.grad.float().norm().double().cpu() ** 2
        self._sum_over_ranks(square)
        norm = float(square.sqrt())
        scale = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0  # as torch.nn.utils.clip_grad_norm_
        if scale < 1.0:
            for gradient in gradients:
                gradient.mul_(scale)
        return norm

    def update(self, rate: float, max_norm: float) -> float:
        """Clip over all ranks, and take the optimizer's step; returns the norm before."""
        norm = self.clip(max_norm)
        self._trained.update(rate)
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """This stage's trained weights and their optimizer's state."""
        return self._trained.state()

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave.

        Raises:
            WrongInputError: they are not this stage's.
        """
        self._trained.load_state(tensors)

    def save(self, *, adapter: Path, model: Path, tokenizer: Any) -> Path:
        """Write the result: one adapter folder for LoRA, one model folder for full training; returns which."""
        if self._adapted is not None:
            adapt.save_adapter(self._adapted, adapter)
            return adapter
        adapt.save_model(self.stage, tokenizer, model)
        return model

    def _forward(self, micro_batch: MicroBatch, learned: int, sums: torch.Tensor) -> _Passing:
        rows, tokens = micro_batch.input_ids.shape
        received = None
        if not self.stage.cut.first:
            with self.waiting.on_device():
                received = self.handoff.recv_forward((rows, tokens, self.stage.hidden_size), self.stage.dtype)
            received.requires_grad_(torch.is_grad_enabled())
        device = self.stage.device.type
        with torch.autocast(device, dtype=self._autocast or torch.bfloat16, enabled=self._autocast is not None):
            output = self.stage.forward(
                micro_batch.input_ids if received is None else received,
                attention_mask=None,
                position_ids=micro_batch.position_ids,
            )
        if not self.stage.cut.last:
            output = output.to(self.stage.dtype)
            self.handoff.send_forward(output)
            return _Passing(received, output)
        loss = token_loss(output, micro_batch.labels, sums)
        return _Passing(received, loss / learned)

    def _backward(self, passing: _Passing) -> None:
        gradient = None
        if not self.stage.cut.last:
            with self.waiting.on_device():
                gradient = self.handoff.recv_backward(tuple(passing.output.shape), self.stage.dtype)
        if passing.output.requires_grad:
            torch.autograd.backward(passing.output, gradient)
        if passing.received is not None:
            grad = passing.received.grad
            self.handoff.send_backward(torch.zeros_like(passing.received) if grad is None else grad)

    def _tally(self, sums: torch.Tensor, learned: int) -> Tally:
        with self.waiting.on_host():  # the last stage has no more to do while the gradients go back
            self._sum_over_ranks(sums)
        return Tally(loss=float(sums[0]) / learned, accuracy=float(sums[1]) / learned)

    def _tied_embedding(self) -> nn.Parameter | None:
        """The embedding that the first and the last stage both hold, where the head is tied to it and it is trained."""
        shared = self.handoff.world > 1 and self._adapted is None and (self.stage.cut.first or self.stage.cut.last)
        if not (shared and self.stage.config.get_text_config(decoder=True).tie_word_embeddings):
            return None
        weight: nn.Parameter = self.stage.decoder.embed_tokens.weight
        return weight

    def _sum_tied_gradient(self) -> None:
        """Both copies of a tied embedding take the step of their summed gradients, and so stay equal."""
        if self._tie is None or self._tie.grad is None:
            return
        other = self.handoff.world - 1 if self.stage.cut.first else 0
        theirs = torch.empty_like(self._tie.grad)
        works = [dist.isend(self._tie.grad, dst=other), dist.irecv(theirs, src=other)]
        for work in works:
            assert work is not None
            work.wait()
        # In one order on both sides: floating-point sums depend on it.
        own_first = (self._tie.grad, theirs) if self.stage.cut.first else (theirs, self._tie.grad)
        self._tie.grad = own_first[0] + own_first[1]

    def _sum_over_ranks(self, values: torch.Tensor) -> None:
        if self.handoff.world > 1:
            dist.all_reduce(values)
