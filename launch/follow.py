"""What becomes of a job, as its files tell it, piece by piece; the job does not know that anyone looks.

A connection that is lost meanwhile is made anew, and reading goes on where it stopped: no line is missing, none comes twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cluster.errors import FailedError
from launch import log_times
from launch.handle import JobHandle, LocalNode
from launch.job import JobState

POLL = 0.1
# A node over the network is asked less often.
POLL_AFAR = 0.25
# How long a node that cannot be reached is tried again, and how often.
LOST_FOR = 900.0
RETRY = 1.0


@dataclass(frozen=True)
class Update:
    """The state, and what was added to the followed file since the last update."""

    state: JobState
    entries: tuple[dict[str, Any], ...]


class Tail:
    """What is appended to a file of a job on the node of a rank, whole lines at a time, from where it stopped."""

    def __init__(self, job: JobHandle, name: str, rank: int = 0) -> None:
        self.rank = rank
        self._job = job
        self._name = name
        self._offset = 0
        self._cut = False  # whether what comes next may begin in the middle of a line, which is not told then

    def skip(self, offset: int) -> None:
        """Pass over so many bytes, and what is left then of the line that they end in."""
        self._offset, self._cut = max(0, offset - 1), offset > 0

    def look(self, *, rest: bool = False) -> tuple[JobState, list[str]]:
        """The job's state there, and the complete lines added since the last call; none while the file is not there yet.

        With `rest`, or once the job has ended there, the last line too, even if it never was completed: nobody writes any more.
        """
        data = b""
        while True:
            state, pieces = self._job.look({self._name: self._offset + len(data)}, self.rank)
            piece = pieces[self._name]
            data += piece
            if not piece or not (rest or state.ended):
                break
        complete = data if rest or state.ended else data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        if self._cut and complete:
            complete, self._cut = complete.partition(b"\n")[2], False
        return state, _split(complete)


def _split(data: bytes) -> list[str]:
    """Lines as a terminal would show them: of a progress bar, which starts its line again and again, the last state."""
    lines = data.decode(errors="replace").removesuffix("\n").split("\n") if data else []
    return [line.rstrip("\r").rpartition("\r")[2] for line in lines]


def patiently(
    look: Callable[[], tuple[JobState, list[str]]], lost: Callable[[FailedError], None] = lambda error: None
) -> tuple[JobState, list[str]]:
    """Look; a node that cannot be reached is tried again for a while, and `lost` is told once.

    Raises:
        FailedError: it was away for too long.
    """
    deadline, told = time.monotonic() + LOST_FOR, False
    while True:
        try:
            return look()
        except FailedError as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                told = True
                lost(error)
            time.sleep(RETRY)


def follow(job: JobHandle, name: str, lost: Callable[[FailedError], None] = lambda error: None) -> Iterator[Update]:
    """Yield an update whenever the state or the JSON lines of a file moved, until the job has ended."""
    tail = Tail(job, name)
    before: JobState | None = None
    while True:
        state, lines = patiently(tail.look, lost)
        entries = tuple(json.loads(line) for line in lines if line.startswith("{"))
        if entries or state != before:
            yield Update(state, entries)
        if state.ended:
            return
        before = state
        time.sleep(pause(job))


def pause(job: JobHandle) -> float:
    """Seconds between two looks."""
    return POLL if isinstance(job.head, LocalNode) else POLL_AFAR


def skip_before(tail: Tail, job: JobHandle, since: datetime) -> None:
    """Have a rank's log begin with what was printed after a time."""
    name, notes = log_times.name_of(tail.rank), b""
    while piece := job.look({name: len(notes)}, tail.rank)[1][name]:
        notes += piece
    tail.skip(log_times.offset(notes.decode("ascii", "replace"), since))


def last_lines(job: JobHandle, rank: int, count: int = 8) -> Sequence[str]:
    """The end of a rank's log, without blank lines; empty where there is none."""
    _, lines = Tail(job, f"rank{rank}.log", rank).look(rest=True)
    return [line for line in lines if line.strip()][-count:]
