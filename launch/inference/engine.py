"""Generation over the stages: groups of sequences take turns; while one is on the second stage, another is on the first.

Rank 0 leads: it decides what each group does next, runs its own layers and sends a header and the hidden states on. The other ranks
follow what the headers say. The last one draws the tokens and returns only their ids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
import torch.distributed as dist
from transformers.cache_utils import DynamicCache

from launch.inference.request import Sampling
from launch.inference.sampler import Row, draw
from launch.shard.handoff import Handoff
from launch.shard.stage import Stage

# Two groups keep two stages busy: with one, each stage would wait while the other computes.
GROUPS = 2
CPU = torch.device("cpu")


class Order(IntEnum):
    """What a header tells the following stages to do."""

    PREFILL = 0
    DECODE = 1
    END = 2


@dataclass
class Running:
    """A prompt and what has been drawn for it so far. `max_tokens` bounds what is drawn, `stop` are the ids that end it."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    on_token: Callable[[int], None] | None = None
    tokens: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be drawn."""
        return len(self.tokens) >= self.max_tokens or (bool(self.tokens) and self.tokens[-1] in self.stop)

    @property
    def finish_reason(self) -> str:
        """`stop` where an end token was drawn, else `length`."""
        return "stop" if self.tokens and self.tokens[-1] in self.stop else "length"


class _Group:
    """What one stage keeps of a group: keys and values of its layers, which positions are padding, where each row stands."""

    def __init__(self, stage: Stage, padding: torch.Tensor, length: int) -> None:
        self.cache: DynamicCache = stage.new_cache()
        columns = torch.arange(length)
        self.mask = (columns >= padding[:, None]).long().to(stage.device)
        self.next_position = (length - padding).to(stage.device)
        self.rows: list[Row] = []

    def advance(self, stage: Stage, inputs: torch.Tensor, *, prefill: bool) -> torch.Tensor:
        """Run the stage over a whole left-padded prompt, or over one new token of each row."""
        if prefill:
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        else:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            positions = self.next_position[:, None]
            self.next_position = self.next_position + 1
        return stage.forward(inputs, attention_mask=self.mask, position_ids=positions, cache=self.cache, keep=1)


class Engine:
    """One rank's part. On rank 0 call `generate` as often as needed, then `close`; on every other rank call `follow`."""

    def __init__(self, stage: Stage, *, pad_token: int = 0) -> None:
        stage.model.eval()
        self.stage = stage
        self.handoff = Handoff(stage.device, alone=stage.cut.whole)
        self.pad_token = pad_token
        self._groups: dict[int, _Group] = {}
        self._awaited: dict[int, tuple[dist.Work | None, torch.Tensor]] = {}

    # ---- rank 0

    @torch.inference_mode()
    def generate(self, sequences: Sequence[Running], *, max_rows: int) -> None:
        """Answer every sequence, in place; at most `max_rows` at once, spread over the groups.

        A group is filled from the waiting sequences in their order, decodes until its last row has finished, and is filled again.
        """
        waiting = deque(sequences)
        groups: dict[int, list[Running]] = {}
        turns: deque[int] = deque()
        room = [-(-max_rows // GROUPS), max_rows // GROUPS]
        for group in range(GROUPS):
            even = -(
                -len(waiting) // (GROUPS - group)
            )  # two short groups keep both stages busy, one full group does not
            if self._fill(group, waiting, groups, min(room[group], even)):
                turns.append(group)
        while turns:
            group = turns.popleft()
            tokens = self._collect(group)
            for row, token in zip(groups[group], tokens, strict=True):
                if not row.finished:
                    row.tokens.append(token)
                    if row.on_token is not None:
                        row.on_token(token)
            if not all(row.finished for row in groups[group]):
                last = [row.tokens[-1] for row in groups[group]]
                self._submit(group, Order.DECODE, torch.tensor(last)[:, None])
                turns.append(group)
            elif self._fill(group, waiting, groups, room[group]):
                turns.append(group)

    def close(self) -> None:
        """Tell the other ranks that nothing more comes."""
        if self.handoff.world > 1:
            self._send_header(Order.END, 0, 0, 0)
            self.handoff.flush()

    def _fill(self, group: int, waiting: deque[Running], groups: dict[int, list[Running]], rows: int) -> bool:
        taken = [waiting.popleft() for _ in range(min(rows, len(waiting)))]
        if not taken:
            return False
        groups[group] = taken
        length = max(len(row.prompt) for row in taken)
        ids = torch.full((len(taken), length), self.pad_token, dtype=torch.int64)
        for index, row in enumerate(taken):
            ids[index, length - len(row.prompt) :] = torch.tensor(list(row.prompt))
        padding = torch.tensor([length - len(row.prompt) for row in taken])
        self._submit(group, Order.PREFILL, ids, padding, [row.sampling for row in taken])
        return True

    def _submit(
        self,
        group: int,
        order: Order,
        ids: torch.Tensor,
        padding: torch.Tensor | None = None,
        samplings: Sequence[Sampling] = (),
    ) -> None:
        rows, length = ids.shape
        if padding is not None:
            self._groups[group] = _Group(self.stage, padding, length)
            self._groups[group].rows = [Row(sampling) for sampling in samplings]
        if self.handoff.world > 1:
            self._send_header(order, group, rows, length)
            if padding is not None:
                self.handoff.send_forward(_encode(padding, samplings), tag=group)
            self._awaited[group] = self.handoff.await_tokens(rows, tag=group)
        output = self._groups[group].advance(self.stage, ids.to(self.stage.device), prefill=order is Order.PREFILL)
        if self.handoff.world > 1:
            self.handoff.send_forward(output, tag=group)
        else:
            self._awaited[group] = (None, self._draw(group, output))

    def _collect(self, group: int) -> list[int]:
        work, tokens = self._awaited.pop(group)
        if work is not None:
            work.wait()
        return [int(token) for token in tokens]

    def _send_header(self, order: Order, group: int, rows: int, length: int) -> None:
        self.handoff.send_forward(torch.tensor([order, group, rows, length]), tag=HEADER_TAG)

    # ---- every other rank

    @torch.inference_mode()
    def follow(self) -> None:
        """Do what rank 0's headers say, until they say END."""
        while True:
            header = self.handoff.recv_forward((4,), torch.int64, device=CPU, tag=HEADER_TAG)
            order, group, rows, length = (int(value) for value in header)
            if not self.stage.cut.last:
                self.handoff.send_forward(header, tag=HEADER_TAG)
            if order == Order.END:
                self.handoff.flush()
                return
            if order == Order.PREFILL:
                facts = self.handoff.recv_forward((rows, FACTS), torch.float64, device=CPU, tag=group)
                padding, samplings = _decode(facts)
                self._groups[group] = _Group(self.stage, padding, length)
                self._groups[group].rows = [Row(sampling) for sampling in samplings]
                if not self.stage.cut.last:
                    self.handoff.send_forward(facts, tag=group)
            hidden = self.handoff.recv_forward((rows, length, self.stage.hidden_size), self.stage.dtype, tag=group)
            output = self._groups[group].advance(self.stage, hidden, prefill=order == Order.PREFILL)
            if self.stage.cut.last:
                self.handoff.return_tokens(self._draw(group, output), tag=group)
            else:
                self.handoff.send_forward(output, tag=group)

    def _draw(self, group: int, logits: torch.Tensor) -> torch.Tensor:
        return torch.tensor(draw(logits[:, -1], self._groups[group].rows))


# Headers travel apart from the groups' tensors, whose tags are the groups' numbers.
HEADER_TAG = GROUPS
# A row of a new group, as numbers: padding, temperature, top_p, top_k, seed. Float64 holds integers up to 2**53 exactly.
FACTS = 5


def _encode(padding: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    facts = [
        [float(pad), s.temperature, s.top_p, float(s.top_k), float(s.seed)]
        for pad, s in zip(padding.tolist(), samplings, strict=True)
    ]
    return torch.tensor(facts, dtype=torch.float64)


def _decode(facts: torch.Tensor) -> tuple[torch.Tensor, list[Sampling]]:
    samplings = [
        Sampling(temperature=row[1], top_p=row[2], top_k=int(row[3]), seed=int(row[4])) for row in facts.tolist()
    ]
    return facts[:, 0].long(), samplings
