"""Which layers go on which stage: contiguous cuts whose heaviest stage is as light as can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.errors import WrongInputError


@dataclass(frozen=True)
class Cut:
    """One stage: layers `start` up to but not including `end`, of `layers` in all."""

    start: int
    end: int
    layers: int

    @property
    def first(self) -> bool:
        """Whether the stage holds the token embedding."""
        return self.start == 0

    @property
    def last(self) -> bool:
        """Whether the stage holds the final norm and the head."""
        return self.end == self.layers

    def __str__(self) -> str:
        parts = ["embedding"] if self.first else []
        parts.append(f"layer {self.start}" if self.end == self.start + 1 else f"layers {self.start}-{self.end - 1}")
        return " + ".join(parts + (["head"] if self.last else []))


def whole(layers: int) -> Cut:
    """The cut of a model that one rank holds alone."""
    return Cut(0, layers, layers)


def balance(
    layer_cost: Sequence[float], *, stages: int, embedding_cost: float = 0, head_cost: float = 0
) -> tuple[Cut, ...]:
    """Cut a model into `stages` contiguous parts so that the costliest part costs as little as can be.

    Args:
        layer_cost: the cost of each layer, in bytes (or in seconds: any additive unit).
        embedding_cost: what the first stage bears besides its layers, in the same unit.
        head_cost: what the last stage bears besides its layers (norm, head).

    Among equally good cuts the one with the fewest layers on the last stage is taken, the stages before it being cut by the same
    rule, so that the result is unique.

    Raises:
        WrongInputError: there are fewer layers than stages.
    """
    count = len(layer_cost)
    if count < stages:
        raise WrongInputError(
            f"the model has {count} layer{'s' * (count != 1)}, fewer than the {stages} ranks it would be split over",
            "set `nodes: 1` to run it whole on one node",
        )
    prefix: list[float] = [embedding_cost]
    for cost in layer_cost:
        prefix.append(prefix[-1] + cost)
    total = prefix[-1] + head_cost

    # best[k][end]: the least possible maximum when the first `end` layers form `k` stages (linear partition, dynamic programming).
    best: list[list[tuple[float, int]]] = [[(prefix[end], 0) for end in range(count + 1)]]
    for k in range(1, stages):
        row: list[tuple[float, int]] = []
        for end in range(count + 1):
            upper = total if k == stages - 1 and end == count else prefix[end]
            options = [(max(best[k - 1][cut][0], upper - prefix[cut]), -cut) for cut in range(k, end)]
            least, negative_cut = min(options, default=(total + 1, 0))
            row.append((least, -negative_cut))
        best.append(row)

    bounds = [count]
    for k in range(stages - 1, 0, -1):
        bounds.append(best[k][bounds[-1]][1])
    bounds.append(0)
    return tuple(Cut(start, end, count) for start, end in pairwise(reversed(bounds)))
