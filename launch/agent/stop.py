"""How an agent is told to go, by a signal: the request to stop the job, or the end of the machine's day."""

from __future__ import annotations

import signal
from types import FrameType

from launch.agent.unit import Unit


class StopAsked(Exception):
    """SIGTERM or SIGINT came to an agent that is in no unit: whoever sent it wants the job to stop."""


class Leaving(Exception):
    """systemd ends the unit: the machine goes down, or its owner stopped it. The job itself goes on when the unit comes back."""


def listen(unit: Unit) -> None:
    """From now on these signals raise; the second one nothing, so that it cannot break into the ending of the ranks."""

    def ask(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        raise Leaving if unit.name else StopAsked

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
