"""When each micro-batch goes forward and backward, and how fast the model learns at each step. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from typing import Literal


class Move(Enum):
    """What a stage does with a micro-batch."""

    FORWARD = "forward"
    BACKWARD = "backward"


def one_forward_one_backward(*, stage: int, stages: int, micro_batches: int) -> Iterator[tuple[Move, int]]:
    """The 1F1B order of one stage (PipeDream-Flush, Narayanan et al. 2021): at most `stages - stage` activations are held at once.

    With frozen weights there is next to no weight gradient that could fill the bubble, so schedules that split it off gain
    nothing. The ceiling is stages * m / (m + stages - 1) times one process for m micro-batches.
    """
    warm_up = min(stages - stage - 1, micro_batches)
    for index in range(warm_up):
        yield Move.FORWARD, index
    for index in range(micro_batches - warm_up):
        yield Move.FORWARD, warm_up + index
        yield Move.BACKWARD, index
    for index in range(micro_batches - warm_up, micro_batches):
        yield Move.BACKWARD, index


def learning_rate(
    step: int, *, total: int, peak: float, warmup_ratio: float, kind: Literal["cosine", "linear", "constant"]
) -> float:
    """The rate of optimizer step `step` (0-based) of `total`, as transformers' schedulers of the same names give it.

    Linear from 0 over the first ceil(warmup_ratio * total) steps to `peak`, then to 0 along half a cosine or a line, or constant.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * step / max(1, warmup)
    if kind == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
