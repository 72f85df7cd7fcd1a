"""What the head's agent tells the peer's: the state of the job, and what the peer is to do. The peer answers with its NodeView."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launch.agent.crew import Meeting
from launch.agent.view import MOST_TEXT
from launch.agent.wire import Path, Wire
from launch.job import JobFolder, JobState
from launch.spec import JobSpec

# Seconds between two messages, when nothing new is to be told.
EVERY = 0.25


@dataclass(frozen=True)
class Order:
    """What the head wants.

    Args:
        meeting: of the newest attempt; None: none was made yet.
        run: the attempt's ranks are to run; else they are to end.
        gently: they are to stop by themselves, in good order.
        ended: the job is over, as `state` says: write it down and go.
    """

    state: JobState
    meeting: Meeting | None = None
    run: bool = False
    gently: bool = False
    ended: bool = False

    def as_json(self) -> dict[str, Any]:
        """For a message."""
        state = self.state.model_copy(
            update={"reason": self.state.reason[:MOST_TEXT], "fix": self.state.fix[:MOST_TEXT]}
        )
        return {
            "state": state.model_dump(mode="json"),
            "meeting": None if self.meeting is None else asdict(self.meeting),
            "run": self.run,
            "gently": self.gently,
            "ended": self.ended,
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Order:
        """From a message."""
        meeting = data["meeting"]
        return cls(
            JobState.model_validate(data["state"]),
            None if meeting is None else Meeting(**{**meeting, "rails": tuple(meeting["rails"])}),
            data["run"],
            data["gently"],
            data["ended"],
        )


def wire(folder: JobFolder, spec: JobSpec, side: int) -> Wire | None:
    """The wire of the head's (0) or the peer's (1) agent; None where there is no link.

    Raises:
        FailedError: another program has the port.
    """
    if spec.link is None:
        return None
    ours, theirs = spec.link.ends(side), spec.link.ends(1 - side)
    paths = [
        Path(here.address, there.address, rail) for rail, (here, there) in enumerate(zip(ours, theirs, strict=True))
    ]
    if all(spec.link.management):
        paths.append(Path(spec.link.management[side], spec.link.management[1 - side], None))
    return Wire(folder.key(), spec.id, side, paths, spec.link.port)
