"""What the doctor is given: the facts of both nodes, and what else is known of the pair. Nothing is looked up again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.errors import RefusedError
from cluster.facts import Facts, Unknown
from cluster.finding import Finding, Level
from cluster.inventory import Inventory
from cluster.link import LinkPlan
from cluster.measurement import Measurement


@dataclass(frozen=True)
class Clock:
    """How far a node's clock is ahead of ours, and how uncertain that is, in seconds: see facts.clock_skew."""

    ahead: float
    within: float


@dataclass(frozen=True)
class Log:
    """The end of a log of a node: what it is called, and its text."""

    node: str
    name: str
    text: str


@dataclass(frozen=True)
class Case:
    """A pair under examination. A node that could not be looked at is Unknown, and so is `plan` then."""

    inventory: Inventory
    nodes: tuple[Facts | Unknown, Facts | Unknown]
    plan: LinkPlan | RefusedError | Unknown
    code: str  # the hash of the code that runs here: see cluster.code
    measurement: Measurement | None = None
    clocks: tuple[Clock, Clock] | None = None
    logs: tuple[Log, ...] = ()

    @property
    def seen(self) -> tuple[Facts, ...]:
        """The facts of the nodes that were looked at."""
        return tuple(facts for facts in self.nodes if isinstance(facts, Facts))

    @property
    def names(self) -> tuple[str, str]:
        """The nodes' names in the inventory."""
        return self.inventory.head.name, self.inventory.peer.name


@dataclass(frozen=True)
class Check:
    """Something that is looked at: the names of the findings that it makes, of each at least one where it can look."""

    names: tuple[str, ...]
    look: Callable[[Case], Iterable[Finding]]


def of_each(name: str, look: Callable[[Facts], Iterable[Finding]]) -> Check:
    """A check of every node by itself."""
    return Check((name,), lambda case: [finding for facts in case.seen for finding in look(facts)])


def of_both(name: str, look: Callable[[Facts, Facts], Iterable[Finding]]) -> Check:
    """A check of both nodes side by side, which needs both."""

    def compare(case: Case) -> Iterable[Finding]:
        head, peer = case.nodes
        if isinstance(head, Facts) and isinstance(peer, Facts):
            return look(head, peer)
        missing = [node for node, facts in zip(case.names, case.nodes, strict=True) if isinstance(facts, Unknown)]
        return [Finding(name, Level.UNKNOWN, None, f"{' and '.join(missing)} could not be looked at")]

    return Check((name,), compare)


def of_the_link(name: str, look: Callable[[Case, LinkPlan, tuple[Facts, Facts]], Iterable[Finding]]) -> Check:
    """A check of the link, which needs a plan of it; then both nodes were looked at."""

    def examine(case: Case) -> Iterable[Finding]:
        head, peer = case.nodes
        if isinstance(case.plan, LinkPlan) and isinstance(head, Facts) and isinstance(peer, Facts):
            return look(case, case.plan, (head, peer))
        reason = case.plan.reason if isinstance(case.plan, Unknown) else "there is no link between the nodes"
        return [Finding(name, Level.UNKNOWN, None, reason)]

    return Check((name,), examine)
