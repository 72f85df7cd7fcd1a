"""What becomes of a job, as its files tell it, piece by piece; the job does not know that anyone looks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job import JobFolder, JobState

POLL = 0.1


@dataclass(frozen=True)
class Update:
    """The state, and what was added to the followed file since the last update."""

    state: JobState
    entries: tuple[dict[str, Any], ...]


class Tail:
    """Reads what is appended to a file, whole lines at a time, from where it stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def lines(self) -> list[str]:
        """The complete lines added since the last call; none while the file is not there yet."""
        data = self._added()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return _split(complete)

    def rest(self) -> list[str]:
        """As `lines`, with the last one even if it never was completed: for when nobody writes any more."""
        data = self._added()
        self._offset += len(data)
        return _split(data)

    def _added(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                return file.read()
        except FileNotFoundError:
            return b""


def _split(data: bytes) -> list[str]:
    """Lines as a terminal would show them: of a progress bar, which starts its line again and again, the last state."""
    lines = data.decode(errors="replace").removesuffix("\n").split("\n") if data else []
    return [line.rstrip("\r").rpartition("\r")[2] for line in lines]


def follow(folder: JobFolder, path: Path) -> Iterator[Update]:
    """Yield an update whenever the state or the JSON lines of `path` moved, until the job has ended."""
    tail = Tail(path)
    before: JobState | None = None
    while True:
        state = folder.state()  # before the lines: what was written before the end is never missed
        entries = tuple(json.loads(line) for line in tail.lines())
        if entries or state != before:
            yield Update(state, entries)
        if state.ended:
            return
        before = state
        time.sleep(POLL)


def last_lines(path: Path, count: int = 8) -> list[str]:
    """The end of a log, without blank lines; empty where there is none."""
    return [line for line in Tail(path).rest() if line.strip()][-count:]
