"""What silence, carrier, progress, memory and the ends of ranks mean for a job. Pure: views in, a verdict out."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from launch.agent.view import LinkView, NodeView, RankView

# Seconds. When one rank dies the others fail on their broken connections; their reports are awaited, to tell cause from echo.
ECHO = 1.0
# The other agent, which talks four times a second, is about to be missed; and how long one that was killed may take to come back.
QUIET = 0.75
RETURNS_WITHIN = 6.0
# Nothing from the other agent, or nothing over a rail: a cable that is moved comes back sooner.
SILENT = 10.0
# A rank that somebody has stopped.
HALTED = 10.0
# No progress while work is pending: so long at least, and so many times what the plan expects of a step, or what one has taken.
STILL = 15.0
STILL_STEPS = 5.0
# A rank that was ordered must be there by then.
STARTED_WITHIN = 30.0
GIB = 1 << 30


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended, in words; `again`: it may go better next time."""

    state: str
    reason: str = ""
    fix: str = ""
    rank: int | None = None
    wrong_input: bool = False
    again: bool = False


SUCCEEDED = Verdict("succeeded")
STOPPED = Verdict("stopped", "stopped on request")


@dataclass(frozen=True)
class Attempt:
    """What is watched: an attempt of `job`, `age` seconds old, over these rails; `joined`: the other node has started its rank."""

    job: str
    number: int
    age: float
    world: int
    step_seconds: float = 0.0
    rails: tuple[int, ...] = ()
    joined: bool = False


def judge(attempt: Attempt, nodes: Sequence[NodeView], link: LinkView | None) -> Verdict | None:
    """What the head makes of all that it sees; None: all is well, or it is too early to tell.

    Args:
        nodes: the head's view of itself, and of the other node what that last told.
        link: None where there is only one node.
    """
    return (
        _left(attempt, nodes)
        or _ended(attempt, nodes, link)
        or (_silent(attempt, nodes, link) if link is not None else None)
        or _memory(nodes)
        or _standing_still(attempt, nodes)
        or _absent(attempt, nodes)
        or _succeeded(attempt, nodes)
    )


def _left(attempt: Attempt, nodes: Sequence[NodeView]) -> Verdict | None:
    for node in nodes[1:]:
        if node.lost:
            return cannot(attempt.job, node)
        if node.leaving:
            return Verdict(
                "failed", f"node {node.node} goes down", f"is it being restarted? see {node.node}", again=True
            )
    return None


def cannot(job: str, node: NodeView) -> Verdict:
    """The end, as a node can start no rank of the job any more."""
    return Verdict("failed", node.lost, f"`sparkctl resume {job}` hands over what is needed, and goes on")


def _ended(attempt: Attempt, nodes: Sequence[NodeView], link: LinkView | None) -> Verdict | None:
    failed = [rank for rank in _ranks(attempt, nodes) if rank.status]
    if not failed:
        return None
    causes = [rank for rank in failed if _is_cause(rank)]
    if not causes:
        dead_for = max(rank.dead_for for rank in failed)
        if attempt.joined and any(node.attempt != attempt.number for node in nodes):
            return None  # the agent behind it has come back: see _absent
        if link is not None and link.silence > QUIET:  # gone with its rank; it may be back in a moment, and tell
            return _vanished(nodes) if dead_for > RETURNS_WITHIN else None
        if dead_for < ECHO:
            return None
    rank = max(causes or failed, key=lambda one: one.dead_for)
    if rank.told and rank.kind == "input":
        return Verdict("failed", rank.message, rank.fix, rank.number, wrong_input=True)
    return Verdict(
        "failed",
        describe(rank) + (f": {rank.message}" if rank.told else ""),
        rank.fix or _advice(attempt.job, rank),
        rank.number,
        again=rank.kind in ("peer", "crash"),
    )


def _vanished(nodes: Sequence[NodeView]) -> Verdict:
    there = nodes[1].node if len(nodes) > 1 else "the other node"
    return Verdict(
        "failed",
        f"node {there}: its agent fell silent and its rank broke off",
        f"is {there} on? `sparkctl status`",
        again=True,
    )


def _ranks(attempt: Attempt, nodes: Sequence[NodeView]) -> list[RankView]:
    """This attempt's; an agent that has come back tells of none, or of an earlier one's."""
    return [rank for node in nodes if node.attempt == attempt.number for rank in node.ranks]


def _is_cause(rank: RankView) -> bool:
    """Whether it ended for a reason of its own: was killed, or failed by itself; not merely the echo of another's end."""
    assert rank.status is not None
    return rank.status < 0 or (rank.told and rank.kind != "peer")


def describe(rank: RankView) -> str:
    """In words: who, and how it ended."""
    status = rank.status or 0
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"rank {rank.number} (node {rank.node}) {how}"


def _advice(job: str, rank: RankView) -> str:
    look = f"sparkctl logs {job} --rank {rank.number}"
    if rank.status == -signal.SIGKILL:  # nobody here sent it
        return f"if the node ran out of memory, `dmesg` there says so; {look}"
    return look


def _silent(attempt: Attempt, nodes: Sequence[NodeView], link: LinkView) -> Verdict | None:
    here, there = nodes[0].node, nodes[1].node if len(nodes) > 1 else "the other node"
    if link.silence > SILENT:
        return Verdict(
            "failed",
            f"no word from node {there} for {SILENT:g} s, on the link or beside it",
            f"is {there} on? `sparkctl status`",
            again=True,
        )
    dead = [rail for rail in attempt.rails if link.rails[rail] > SILENT]
    if not dead:
        return None
    dark = [
        f"{node.node}'s end of rail {rail} has no carrier"
        for rail in dead
        for node in nodes
        if len(node.carrier) > rail and not node.carrier[rail]
    ]
    why = dark[0] if dark else "both ends have a carrier"
    which = "the link" if len(dead) == len(link.rails) else f"rail {dead[0]} of the link"
    return Verdict(
        "failed",
        f"nothing came over {which} from {there} to {here} for {SILENT:g} s ({why})",
        "look at the cable between the boxes; `sparkctl doctor` looks at the rest",
        again=True,
    )


def _memory(nodes: Sequence[NodeView]) -> Verdict | None:
    for node in nodes:
        if node.available is not None and node.busy and node.available < node.floor:
            return Verdict(
                "failed",
                f"node {node.node}: only {node.available / GIB:.1f} GiB of memory were available; below {node.floor / GIB:.1f} GiB "
                "a box freezes, so the job was stopped",
                "end what else runs there, or make the job smaller: `sparkctl plan` shows what takes the room",
            )
    return None


def _standing_still(attempt: Attempt, nodes: Sequence[NodeView]) -> Verdict | None:
    ranks = [rank for rank in _ranks(attempt, nodes) if rank.status is None]
    for rank in ranks:
        if rank.halted_for > HALTED:
            return Verdict(
                "failed",
                f"rank {rank.number} (node {rank.node}) is stopped, as by SIGSTOP, for {HALTED:g} s",
                f"look who stopped process {rank.pid} there",
                rank.number,
                again=True,
            )
    slowest = max((rank.slowest for rank in ranks), default=0.0)
    patience = max(STILL, STILL_STEPS * attempt.step_seconds, STILL_STEPS * slowest)
    still = [rank for rank in ranks if rank.still_for is not None and rank.still_for > patience]
    if not still:
        return None
    rank = max(still, key=lambda one: (one.halted_for, one.still_for or 0.0))
    return Verdict(
        "failed",
        f"rank {rank.number} (node {rank.node}) has made no progress for {patience:.0f} s, after step {rank.step}",
        f"sparkctl logs {attempt.job} --rank {rank.number}; `sparkctl doctor` looks at the link",
        rank.number,
        again=True,
    )


def _absent(attempt: Attempt, nodes: Sequence[NodeView]) -> Verdict | None:
    for node in nodes:
        if node.attempt == attempt.number:
            continue
        if attempt.joined:
            return Verdict(
                "failed",
                f"the agent of node {node.node} ended and came back",
                f"was {node.node} restarted? `journalctl --user` there",
                again=True,
            )
        if attempt.age > STARTED_WITHIN:
            return Verdict("failed", f"node {node.node} did not start its rank within {STARTED_WITHIN:g} s", again=True)
    return None


def _succeeded(attempt: Attempt, nodes: Sequence[NodeView]) -> Verdict | None:
    ranks = _ranks(attempt, nodes)
    if len(ranks) == attempt.world and all(rank.status == 0 for rank in ranks):
        return SUCCEEDED
    return None


def is_well(nodes: Sequence[NodeView], link: LinkView | None, needed: Sequence[int]) -> str:
    """What still keeps the job from being started again, in words; empty: nothing.

    Args:
        needed: bytes of memory that each node's ranks will take.
    """
    for node, size in zip(nodes, needed, strict=True):
        if lacking := _lacking(node, size):
            return f"node {node.node} {lacking}"
    if link is not None and link.silence > FRESH:
        return "the other node does not answer"
    return "the link carries nothing" if link is not None and not rails_up(nodes, link) else ""


def _lacking(node: NodeView, size: int) -> str:
    if node.busy:
        return "is still ending its rank"
    if node.leaving:
        return "goes down"
    if node.available is not None and node.available < size + node.floor:
        return f"has {node.available / GIB:.1f} GiB of memory available, and the job needs {size / GIB:.1f}"
    if node.disk_free is not None and node.disk_free < LEAST_DISK:
        return f"has {node.disk_free >> 20} MiB of disk free"
    return ""


# Seconds: what was heard since counts as now.
FRESH = 2.0
LEAST_DISK = 64 << 20


def rails_up(nodes: Sequence[NodeView], link: LinkView) -> tuple[int, ...]:
    """The rails that work: carrier at both ends, and words over them."""
    return tuple(
        rail
        for rail, silence in enumerate(link.rails)
        if silence < FRESH and all(len(node.carrier) > rail and node.carrier[rail] for node in nodes)
    )
