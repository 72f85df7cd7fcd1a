"""What the benchmarks share: ranks pinned to a core each, and medians."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

REPEATS = 5


def pin(rank: int) -> None:
    """Keep a rank on a core of its own, as far as there are cores."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def median(measure: Callable[[], float]) -> float:
    """The median of five measurements, after one that warms up."""
    measure()
    return statistics.median(measure() for _ in range(REPEATS))
