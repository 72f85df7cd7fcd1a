"""One rank's stage, step by step: places, masks, the layers, and on the last stage the drawing of tokens."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cluster.errors import WrongInputError
from launch.inference import wire
from launch.inference.sampler import Row, draw
from launch.inference.slots import Place, Slots, full_mask, window_mask
from launch.inference.temper import tempered
from launch.inference.wire import WireStep
from launch.shard.stage import Stage

_ATTENDING = ("full_attention", "sliding_attention", "chunked_attention")
_WITHOUT_MASK = ("linear_attention", "conv")


class Chooser(Protocol):
    """Has each row of a step computed with an adapter of its own."""

    def choose(self, rows: Sequence[int]) -> None:
        """The adapter's number of each row; 0 is none."""


@dataclass
class _Drawn:
    """How a slot's sequence is drawn from."""

    row: Row
    top: int
    prompt_top: int


class Runner:
    """A stage and the slots of its sequences."""

    def __init__(self, stage: Stage, *, slots: int, longest: int, adapters: Chooser | None = None) -> None:
        stage.model.eval()
        self.stage = stage
        self.slots = Slots(stage, slots, longest)
        self.busy = 0.0
        self._adapters = adapters
        self._drawn: dict[int, _Drawn] = {}
        self._takes_masks_by_kind = "attention_mask, dict)" in inspect.getsource(type(stage.decoder).forward)
        self._in_chunks = "chunked_attention" in self._check_kinds()
        self._tempers = tempered(stage)

    @property
    def shares(self) -> bool:
        """Whether a slot may begin as another does: nothing is kept but a column for each position."""
        return not self.slots.windows and not self.slots.has_states

    @property
    def packs(self) -> bool:
        """Whether rows of different lengths may be read together."""
        return not self.slots.has_states

    def run(self, step: WireStep, inputs: torch.Tensor) -> torch.Tensor:
        """Run this rank's layers.

        Args:
            inputs: token ids [rows, tokens] on the first stage, else hidden states [rows, tokens, hidden].

        Returns:
            hidden states [rows, tokens, hidden], or on the last stage the numbers of the reply.
        """
        began = time.perf_counter()
        self._open(step)
        rows = step.rows
        place = Place.of(
            [row.slot for row in rows], [row.start for row in rows], [row.count for row in rows], self.stage.device
        )
        if self._adapters is not None:
            self._adapters.choose([row.adapter for row in rows])
        for temper in self._tempers:
            temper.positions = place.positions
        output = self.stage.forward(
            inputs,
            attention_mask=self._masks(place),
            position_ids=place.positions.clamp(min=0),
            cache=self.slots.enter(place),
            keep=step.keep,
        )
        self.slots.leave(place)
        if not self.stage.cut.last:
            self._spent(began)
            return output
        numbers = self._reply(step, output)
        self._spent(began)
        return torch.tensor([self.busy, *numbers], dtype=torch.float64)

    def _check_kinds(self) -> set[str]:
        """The kinds of layers. A mask that does not fit a layer would be silently wrong, so what is not known is refused."""
        kinds = set(getattr(self.stage.config.get_text_config(decoder=True), "layer_types", None) or ())
        attending = kinds - set(_WITHOUT_MASK)
        several = len(attending) > 1 and not self._takes_masks_by_kind
        unknown = attending - set(_ATTENDING)
        unknown |= attending if {"sliding_attention", "chunked_attention"} <= attending else set()
        if unknown or several or len({layer.window for layer in self.slots.windows}) > 1:
            raise WrongInputError(
                f"{type(self.stage.model).__name__}: its layers ({', '.join(sorted(kinds))}) cannot be served together yet",
                "choose another model",
            )
        return kinds

    def _spent(self, began: float) -> None:
        if self.stage.device.type == "cuda":
            torch.cuda.synchronize(self.stage.device)
        self.busy += time.perf_counter() - began

    def _open(self, step: WireStep) -> None:
        for opening in step.openings:
            self._drawn[opening.slot] = _Drawn(opening.row, opening.logprobs, opening.prompt_logprobs)
            if opening.shared and opening.source != opening.slot:
                self.slots.copy(opening.source, opening.slot, opening.shared)

    def _masks(self, place: Place) -> Any:
        dtype = self.stage.dtype
        windows = self.slots.windows
        if not self._takes_masks_by_kind:
            return window_mask(place, windows[0], dtype) if windows else full_mask(place, dtype)
        masks: dict[str, torch.Tensor | None] = dict.fromkeys(_WITHOUT_MASK)
        masks |= dict.fromkeys(_ATTENDING, full_mask(place, dtype))
        if windows:
            kind = "chunked_attention" if self._in_chunks else "sliding_attention"
            masks[kind] = window_mask(place, windows[0], dtype, in_chunks=self._in_chunks)
        return masks

    def _reply(self, step: WireStep, logits: torch.Tensor) -> list[float]:
        drawing = [index for index, row in enumerate(step.rows) if row.draws]
        kept = [self._drawn[step.rows[index].slot] for index in drawing]
        last = logits[:, -1]
        if len(drawing) < len(step.rows):
            last = last[drawing]
        tokens = dict(zip(drawing, draw(last, [one.row for one in kept]) if kept else [], strict=True))
        numbers: list[float] = []
        for index, row in enumerate(step.rows):
            drawn = self._drawn[row.slot]
            for offset in range(row.scores):  # such a row is alone, and all its positions have logits
                token = drawn.row.prompt[row.start + offset + 1]
                numbers += wire.told(token, logits[index, offset], drawn.prompt_top)
            if row.draws and drawn.top < 0:
                numbers.append(tokens[index])
            elif row.draws:
                numbers += wire.told(tokens[index], logits[index, -1], drawn.top)
        return numbers
