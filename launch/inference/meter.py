"""How busy each stage was of late."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# Seconds over which shares are taken, and between two readings that are kept.
OVER = 10.0
EVERY = 0.1


class Meter:
    """Turns the stages' totals of busy seconds into shares of the time that has passed."""

    def __init__(self, stages: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._readings: deque[tuple[float, tuple[float, ...]]] = deque([(clock(), (0.0,) * stages)])

    def shares(self, totals: tuple[float, ...]) -> tuple[float, ...]:
        """Each stage's share of the last ten seconds, 0 to 1, given the seconds that it has computed since its start."""
        now = self._clock()
        if now - self._readings[-1][0] >= EVERY:
            self._readings.append((now, totals))
        while len(self._readings) > 2 and now - self._readings[0][0] > OVER:
            self._readings.popleft()
        began, before = self._readings[0]
        passed = max(now - began, EVERY)
        return tuple(
            min(1.0, max(0.0, (total - earlier) / passed)) for total, earlier in zip(totals, before, strict=True)
        )
