"""Which layers go on which stage: contiguous cuts, as even in time as can be, or in memory where that is scarce."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise

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

    @property
    def whole(self) -> bool:
        """Whether the stage is the model."""
        return self.first and self.last

    def __str__(self) -> str:
        parts = ["embedding"] if self.first else []
        parts.append(f"layer {self.start}" if self.end == self.start + 1 else f"layers {self.start}-{self.end - 1}")
        return " + ".join(parts + (["head"] if self.last else []))


def whole(layers: int) -> Cut:
    """The cut of a model that one rank holds alone."""
    return Cut(0, layers, layers)


# Up to this share of its memory a node has room to spare, and the faster cut is worth more than the more even one.
AMPLE = 0.9


def balance(
    layer_cost: Sequence[float],
    *,
    stages: int,
    embedding_cost: float = 0,
    head_cost: float = 0,
    filled: Callable[[Cut, int], float] | None = None,
) -> tuple[Cut, ...]:
    """Cut a model into `stages` contiguous parts so that the costliest part costs as little as can be.

    Args:
        layer_cost: the cost of each layer, in seconds (or in bytes: any additive unit).
        embedding_cost: what the first stage bears besides its layers, in the same unit.
        head_cost: what the last stage bears besides its layers (norm, head).
        filled: the share of its node's memory that a cut takes as the stage of a number; more than 1 does not fit.

    Where a node would be filled beyond AMPLE, the cut is taken whose fullest node is least full, and cost breaks ties; else cost
    decides, and the fullest node breaks ties. Among cuts equal in both the one with the fewest layers on the last stage is taken,
    then on the one before it, so that the result is unique.

    Raises:
        WrongInputError: there are fewer layers than stages.
    """
    count = len(layer_cost)
    if count < stages:
        raise WrongInputError(
            f"the model has {count} layer{'s' * (count != 1)}, fewer than the {stages} ranks it would be split over",
            "set `nodes: 1` to run it whole on one node",
        )
    sums = list(accumulate(layer_cost, initial=0.0))
    total = (sums[-1] + embedding_cost + head_cost) or 1.0

    def rank(cuts: tuple[Cut, ...]) -> tuple[float, ...]:
        costs = [sums[c.end] - sums[c.start] + embedding_cost * c.first + head_cost * c.last for c in cuts]
        slowest = round(max(costs) / total, 12)  # sums that should be equal differ in their last digits
        fullest = max(filled(cut, stage) for stage, cut in enumerate(cuts)) if filled else 0.0
        ample = fullest <= AMPLE
        return (0.0, slowest, fullest) if ample else (1.0, fullest, slowest)

    return min(every_cut(count, stages), key=lambda cuts: (rank(cuts), [-cut.start for cut in reversed(cuts)]))


def every_cut(layers: int, stages: int) -> Iterator[tuple[Cut, ...]]:
    """Every way to cut `layers` layers into `stages` contiguous parts with a layer in each."""
    for inner in combinations(range(1, layers), stages - 1):
        yield tuple(Cut(start, end, layers) for start, end in pairwise((0, *inner, layers)))


def has_room(layers: int, stages: int, filled: Callable[[Cut, int], float]) -> bool:
    """Whether any cut fits; `filled` as in `balance`, growing with the layers that a stage holds."""
    starts = {0}  # where the next stage could begin
    for stage in range(stages - 1):
        most = layers - (stages - 1 - stage)  # each stage after it gets a layer
        ends: set[int] = set()
        for start in starts:
            candidates = range(start + 1, most + 1)
            fitting = bisect_right(candidates, 1.0, key=_filled_to(start, layers, stage, filled))
            ends.update(candidates[:fitting])
        starts = ends
    return bool(starts) and filled(Cut(max(starts), layers, layers), stages - 1) <= 1.0


def _filled_to(start: int, layers: int, stage: int, filled: Callable[[Cut, int], float]) -> Callable[[int], float]:
    return lambda end: filled(Cut(start, end, layers), stage)
