"""What a rank tells its agent: one JSON object a line, through a pipe that the agent hands it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

REPORT_FD = "SPARKCTL_REPORT_FD"

# What an agent sends to a rank that can stop in good order.
STOP_SIGNAL = signal.SIGUSR1
# Seconds between two beats that are worth a line.
BEAT_EVERY = 0.5

# input: the owner must change something; told: the rank itself says what is wrong, and it would be so again; memory: it ran out of
# it; peer: only the echo of another rank's end; crash: anything else, which may pass.
FailureKind = Literal["input", "told", "memory", "peer", "crash"]


@dataclass(frozen=True)
class Report:
    """One line of the pipe.

    `running` and `ready` (it answers requests) move the job's state. After a `step` or a `beat` the rank has work and is
    expected to make progress; after `loading` or `rest` it may be silent for as long as it likes. `message` says of what it rests.
    `gentle`: it can stop in good order when it is asked to.
    """

    event: Literal["loading", "running", "ready", "step", "beat", "rest", "gentle", "failed"]
    step: int = 0
    kind: FailureKind = "crash"
    message: str = ""
    fix: str = ""


class Reporter:
    """The rank's end of the pipe. Under torchrun there is no agent, and what is told goes nowhere."""

    def __init__(self) -> None:
        given = os.environ.get(REPORT_FD)
        self._descriptor = int(given) if given else None
        self._beat_at = float("-inf")
        self.stop_asked = False

    def listen_for_stop(self) -> None:
        """From here on this rank looks at `stop_asked` now and then, and ends by itself, in good order, when it is set.

        The ranks are asked at about the same time, not at the same step: they must agree on one before they stop. To be called
        from the main thread.
        """

        def ask(_number: int, _frame: object) -> None:
            self.stop_asked = True

        signal.signal(STOP_SIGNAL, ask)
        self.tell(Report("gentle"))

    def beat(self) -> None:
        """Something was computed, sent or received: the rank makes progress. Cheap: call it as often as you like."""
        now = time.monotonic()
        if now - self._beat_at >= BEAT_EVERY:
            self._beat_at = now
            self.tell(Report("beat"))

    def rest(self, why: str) -> None:
        """From here to the next beat or step nothing is expected: no work is pending, or it takes as long as it takes."""
        self._beat_at = float("-inf")
        self.tell(Report("rest", message=why))

    def tell(self, report: Report) -> None:
        """Send one report. When the agent is gone this rank ends at once: none outlives its agent.

        The kernel sees to that where it can; but not before the rank has asked it to, and on Linux alone.
        """
        if self._descriptor is not None:
            try:
                os.write(self._descriptor, json.dumps(asdict(report)).encode() + b"\n")
            except BrokenPipeError:
                os._exit(1)


_OWN: list[Reporter] = []


def pulse() -> None:
    """This rank has sent or received something: see Reporter.beat. Nothing where no reporter was made known."""
    for reporter in _OWN:
        reporter.beat()


def listens(reporter: Reporter) -> None:
    """From here on `pulse` is told to this reporter."""
    _OWN[:] = [reporter]


class Reports:
    """The agent's end: turns chunks of bytes into reports."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[Report]:
        """Yield the reports that `chunk` completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield Report(**json.loads(line))
