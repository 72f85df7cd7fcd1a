"""What an agent sees of its node: its ranks, its memory, its rails. Told to the other agent as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from launch.agent.report import FailureKind

# A reason longer than this is cut: a view must fit into a datagram.
MOST_TEXT = 700

Phase = Literal["started", "loading", "running", "ready"]


@dataclass(frozen=True)
class RankView:
    """One rank.

    Args:
        status: how it ended: an exit status, or a signal's number less than 0; None: it runs.
        dead_for: seconds since it ended.
        still_for: seconds since it last made progress; None: none is expected of it.
        halted_for: seconds since it was seen stopped by a signal (SIGSTOP): it does nothing until another comes.
        slowest: the longest time in seconds between two signs of progress so far.
        gentle: it can stop in good order when it is asked to.
        told: it has said why it failed: `kind`, `message` and `fix`.
    """

    number: int
    node: str
    pid: int
    phase: Phase = "started"
    step: int = 0
    status: int | None = None
    dead_for: float = 0.0
    still_for: float | None = None
    halted_for: float = 0.0
    slowest: float = 0.0
    gentle: bool = False
    told: bool = False
    kind: FailureKind = "crash"
    message: str = ""
    fix: str = ""


@dataclass(frozen=True)
class NodeView:
    """One node.

    Args:
        attempt: the one that its ranks belong to; 0: none was started.
        ranks: those that were started, whether they run or not.
        available: bytes of memory; None: unknown.
        floor: bytes that must stay available.
        carrier: of each rail, whether the cable is in and lives; empty where there is no link.
        disk_free: bytes free for the job's folder; None: unknown.
        leaving: the machine goes down, or the agent was told to go.
        ended: it has written the end of the job down, and goes.
        lost: why it can start no rank of this job any more; empty: it can.
        warning: what slows the job down there, and what to do; empty: nothing that is known.
    """

    node: str
    attempt: int = 0
    ranks: tuple[RankView, ...] = ()
    available: int | None = None
    floor: int = 0
    carrier: tuple[bool, ...] = ()
    disk_free: int | None = None
    leaving: bool = False
    ended: bool = False
    agent_pid: int = 0
    warning: str = ""
    lost: str = ""

    @property
    def busy(self) -> bool:
        """Whether any rank runs."""
        return any(rank.status is None for rank in self.ranks)

    def as_json(self) -> dict[str, Any]:
        """For a message."""
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> NodeView:
        """From a message."""
        ranks = tuple(RankView(**rank) for rank in data["ranks"])
        return cls(**{**data, "ranks": ranks, "carrier": tuple(data["carrier"])})


@dataclass(frozen=True)
class LinkView:
    """What the head's agent has heard of the peer's: seconds since, on any path and on each rail."""

    silence: float
    rails: tuple[float, ...] = field(default_factory=tuple)
