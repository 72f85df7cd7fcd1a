"""What a rank tells its agent: one JSON object a line, through a pipe that the agent hands it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

REPORT_FD = "SPARKCTL_REPORT_FD"

# input: the owner must change something; peer: only the echo of another rank's end; crash: anything else.
FailureKind = Literal["input", "peer", "crash"]


@dataclass(frozen=True)
class Report:
    """One line of the pipe."""

    event: Literal["loading", "running", "step", "failed"]
    step: int = 0
    kind: FailureKind = "crash"
    message: str = ""
    fix: str = ""


class Reporter:
    """The rank's end of the pipe. Under torchrun there is no agent, and what is told goes nowhere."""

    def __init__(self) -> None:
        given = os.environ.get(REPORT_FD)
        self._descriptor = int(given) if given else None

    def tell(self, report: Report) -> None:
        """Send one report. When the agent is gone this rank ends at once: none outlives its agent.

        The kernel sees to that where it can; but not before the rank has asked it to, and on Linux alone.
        """
        if self._descriptor is not None:
            try:
                os.write(self._descriptor, json.dumps(asdict(report)).encode() + b"\n")
            except BrokenPipeError:
                os._exit(1)


class Reports:
    """The agent's end: turns chunks of bytes into reports."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[Report]:
        """Yield the reports that `chunk` completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield Report(**json.loads(line))
