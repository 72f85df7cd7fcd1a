"""When what was printed, for `logs --since`: logs carry no times, so an agent notes now and then how long each of them is."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from cluster.errors import WrongInputError
from launch.job import JobFolder

# Seconds between two notes: a line is told up to so much too many.
EVERY = 1.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def name_of(rank: int) -> str:
    """The file in a job's folder that tells the times of a rank's log: a line is Unix seconds and the bytes that there were."""
    return f"rank{rank}.times"


class LogTimes:
    """An agent's notes on the logs of its ranks."""

    def __init__(self, folder: JobFolder, ranks: Iterable[int]) -> None:
        self._folder = folder
        self._sizes = dict.fromkeys(ranks, 0)
        self._noted_at = float("-inf")

    def note(self) -> None:
        """Note what has grown since the last time, if that is a while ago. A full disk loses a note, and nothing else."""
        now = time.monotonic()
        if now - self._noted_at < EVERY:
            return
        self._noted_at = now
        for rank, before in self._sizes.items():
            with contextlib.suppress(OSError):
                size = self._folder.log(rank).stat().st_size
                if size != before:
                    with (self._folder.path / name_of(rank)).open("a", encoding="ascii") as file:
                        file.write(f"{time.time():.1f} {size}\n")
                    self._sizes[rank] = size


def offset(notes: str, since: datetime) -> int:
    """How many bytes of a log were there at a time, by its notes; rather too few than too many. Pure."""
    found = 0
    for line in notes.splitlines():
        noted, _, size = line.partition(" ")
        if not size.isdigit() or float(noted) > since.timestamp():
            break
        found = int(size)
    return found


def moment(given: str, now: datetime) -> datetime:
    """What `--since` names: a time, local where it has no zone, or so long before `now` (90s, 10m, 2h, 1d). Pure.

    Raises:
        WrongInputError: neither.
    """
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", given.strip()):
        return now - timedelta(seconds=float(found[1]) * _UNITS[found[2]])
    try:
        return datetime.fromisoformat(given.strip()).astimezone(UTC)
    except ValueError:
        raise WrongInputError(
            f"--since {given}: neither how long ago nor a time", "as in --since 10m, or --since 2026-11-26T08:00"
        ) from None
