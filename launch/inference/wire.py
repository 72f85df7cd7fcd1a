"""What travels beside the hidden states: a header of 32 bytes, and only when a group changes, who is in it now. Nothing is pickled.

Numbers travel as float64, which holds integers up to 2**53 exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from launch.inference.request import GenerationRequest, Sampling
from launch.inference.sampler import Row, scores

HEADER = 4
# How many numbers a step begins with, and what a row and an opening take in it.
_ROW = 6
_OPENING = 14


class Order(IntEnum):
    """What a header tells the following stages to do."""

    STEP = 0  # what it consists of follows
    AGAIN = 1  # the group's last step once more, one token further on
    IDLE = 2
    END = 3


@dataclass(frozen=True)
class WireRow:
    """One row of a step. `scores`: how many of its tokens are scored as parts of a prompt."""

    slot: int
    start: int
    count: int
    draws: bool = True
    adapter: int = 0
    scores: int = 0


@dataclass(frozen=True)
class WireOpening:
    """A sequence enters a slot, which begins with `shared` tokens of the slot `source`. How to draw is for the last stage."""

    slot: int
    source: int
    shared: int
    row: Row
    logprobs: int = -1
    prompt_logprobs: int = -1

    @classmethod
    def of(cls, request: GenerationRequest, slot: int, source: int, shared: int, drawn: Sequence[int]) -> WireOpening:
        """The opening of a request that `drawn` has come of already."""
        tops = [-1 if top is None else top for top in (request.sampling.logprobs, request.prompt_logprobs)]
        return cls(slot, source, shared, Row(request.sampling, request.prompt, list(drawn)), *tops)


@dataclass(frozen=True)
class WireStep:
    """What every stage needs to know of a step."""

    group: int
    rows: tuple[WireRow, ...]
    openings: tuple[WireOpening, ...] = ()
    keep: int = 1

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(row.count for row in self.rows)

    def follows(self, last: WireStep | None) -> bool:
        """Whether it is `last`, one token further on."""
        return last is not None and not self.openings and self == last.again() and self.length == 1

    def again(self) -> WireStep:
        """The step after this one."""
        rows = tuple(WireRow(row.slot, row.start + row.count, 1, True, row.adapter) for row in self.rows)
        return WireStep(self.group, rows)

    def pack(self) -> torch.Tensor:
        """As float64 numbers."""
        numbers: list[float] = [self.group, self.keep, len(self.rows), len(self.openings)]
        for row in self.rows:
            numbers += [row.slot, row.start, row.count, row.draws, row.adapter, row.scores]
        for opening in self.openings:
            rule, drawn = opening.row.sampling, opening.row.drawn
            # Most draws do not depend on the tokens before, which then need not travel.
            prompt = opening.row.prompt if opening.row.has_penalties or opening.prompt_logprobs >= 0 else ()
            numbers += [opening.slot, opening.source, opening.shared, opening.logprobs, opening.prompt_logprobs]
            numbers += [rule.temperature, rule.top_p, rule.top_k, rule.min_p, rule.repetition_penalty]
            numbers += [rule.presence_penalty, rule.frequency_penalty, rule.seed, len(prompt)]
            numbers += [*prompt, len(drawn), *drawn]
        return torch.tensor(numbers, dtype=torch.float64)

    @classmethod
    def unpack(cls, numbers: torch.Tensor) -> WireStep:
        """What `pack` made."""
        values = iter(numbers.tolist())
        group, keep, rows, openings = (int(next(values)) for _ in range(4))
        return cls(
            group,
            tuple(_row(values) for _ in range(rows)),
            tuple(_opening(values) for _ in range(openings)),
            keep,
        )


def _row(values: Iterator[float]) -> WireRow:
    slot, start, count, draws, adapter, scored = (int(next(values)) for _ in range(_ROW))
    return WireRow(slot, start, count, bool(draws), adapter, scored)


def _opening(values: Iterator[float]) -> WireOpening:
    slot, source, shared, top, prompt_top, t, p, k, least, repetition, presence, frequency, seed, length = (
        next(values) for _ in range(_OPENING)
    )
    sampling = Sampling(
        temperature=t,
        top_p=p,
        top_k=int(k),
        min_p=least,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        seed=int(seed),
    )
    prompt = [int(next(values)) for _ in range(int(length))]
    drawn = [int(next(values)) for _ in range(int(next(values)))]
    return WireOpening(int(slot), int(source), int(shared), Row(sampling, prompt, drawn), int(top), int(prompt_top))


@dataclass(frozen=True)
class Told:
    """A token with its log probability and the likeliest ones, where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Reply:
    """What the last stage returns of a step: seconds for which it has computed so far, and for each row scores and a token."""

    busy: float
    rows: tuple[tuple[tuple[Told, ...], Told | None], ...] = field(default=())


def width(top: int) -> int:
    """How many numbers a token takes whose `top` likeliest ones are told (-1: not even its own log probability)."""
    return 1 if top < 0 else 2 + 2 * top


def reply_size(step: WireStep, tops: Sequence[tuple[int, int]]) -> int:
    """How many numbers the reply to a step has; `tops`: logprobs and prompt_logprobs of each row."""
    rows = zip(step.rows, tops, strict=True)
    return 1 + sum(row.scores * width(prompt_top) + row.draws * width(top) for row, (top, prompt_top) in rows)


def told(token: int, logits: torch.Tensor, top: int) -> list[float]:
    """A token as numbers; `logits` [vocabulary]."""
    if top < 0:
        return [token]
    own, best = scores(logits[None], [token], top)[0]
    flat = [number for pair in best for number in pair]
    return [token, own, *flat, *[0.0] * (2 * top - len(flat))]


def read_reply(numbers: torch.Tensor, step: WireStep, tops: Sequence[tuple[int, int]]) -> Reply:
    """What the last stage has sent."""
    values = iter(numbers.tolist())
    busy = next(values)
    rows = []
    for row, (top, prompt_top) in zip(step.rows, tops, strict=True):
        scored = tuple(_told(values, prompt_top) for _ in range(row.scores))
        rows.append((scored, _told(values, top) if row.draws else None))
    return Reply(busy, tuple(rows))


def _told(values: Iterator[float], top: int) -> Told:
    token = int(next(values))
    if top < 0:
        return Told(token)
    own = next(values)
    return Told(token, own, tuple((int(next(values)), next(values)) for _ in range(top)))
