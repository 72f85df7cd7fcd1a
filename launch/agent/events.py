"""What an agent did and when, a line each: events.jsonl of a job. In UTC by this node's clock, and in seconds of its steady one."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import UTC, datetime

from launch.job import JobFolder


class Events:
    """Appends; a full disk loses lines and no more."""

    def __init__(self, folder: JobFolder) -> None:
        self._path = folder.events

    def note(self, event: str, **details: object) -> None:
        """Add one line."""
        line = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "clock": round(time.monotonic(), 3)}
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"event": event} | details) + "\n")
