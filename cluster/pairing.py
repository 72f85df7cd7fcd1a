"""Two boxes become a verified pair, and cease to be one: `up` and `down`.

facts -> plan of the link -> changes -> shown -> made under both locks -> verified -> recorded. What fails before the end is undone
on both nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Protocol

from cluster import code, collective, environ, measure, measurement, record, transaction, verify
from cluster import survey as surveying
from cluster.changes import Planned
from cluster.code import Code
from cluster.doctor.bandwidth import judge
from cluster.errors import FailedError, RefusedError
from cluster.finding import Finding, Level
from cluster.inventory import Inventory, is_secret
from cluster.measurement import Measurement
from cluster.record import LinkRecord, NodeRecord, PairRecord, Verdict
from cluster.survey import Survey, Unfinished, each
from cluster.transaction import Host, Outcome, Transaction
from cluster.transport import Transport
from cluster.transport.hostkeys import UnknownHostKeyError
from cluster.transport.sudo import Sudo
from cluster.wishes import KEY, Sites, changes, code_path, is_key

_ANY_PORT = 29500
_PER_JOB = frozenset({"MASTER_PORT"})  # each job takes its own


@dataclass(frozen=True)
class Proposal:
    """What `up` would do: the link as planned, and what each node gets, by rank."""

    survey: Survey
    planned: tuple[tuple[Planned, ...], tuple[Planned, ...]]

    @property
    def done(self) -> bool:
        """Whether there is nothing to do."""
        return all(plan.done for plans in self.planned for plan in plans)


class Dialogue(Protocol):
    """Whoever has called `up`."""

    def accept(self, unknown: UnknownHostKeyError) -> bool:
        """Whether the host key, never seen before, is the node's."""
        ...

    def mend(self, left: Sequence[Unfinished]) -> bool:
        """Whether what died runs have left is to be undone now. Without that nothing more is looked at."""
        ...

    def approve(self, proposal: Proposal) -> bool:
        """Whether to do it."""
        ...

    def tell(self, node: str, said: str) -> None:
        """What is being done, on a node."""
        ...


@dataclass(frozen=True)
class Paired:
    """A pair that works, and whether anything had to be changed for it."""

    record: PairRecord
    changed: bool


def up(
    inventory: Inventory,
    transports: Sequence[Transport],
    dialogue: Dialogue,
    *,
    sudo: Sudo | None = None,
    wheelhouse: str | None = None,
    remeasure: bool = False,
    seconds: float | None = 2.0,
) -> Paired | None:
    """Make the inventory's nodes a pair; None if the dialogue did not approve.

    Args:
        wheelhouse: a folder of wheels on both nodes, to install from in place of the package index.
        remeasure: measure the link even if it was measured before and passed.
        seconds: for each run of the measurement; None leaves a link that was not measured yet `unverified`.

    Raises:
        RefusedError: it is not to be had as things are, or somebody else is changing a node.
        FailedError: something went wrong. What had been changed is undone, and the error says so.
    """
    hosts = [Host(transport, sudo) for transport in transports]
    surveying.meet(transports, dialogue.accept)
    left = surveying.unfinished(hosts)
    if left:
        if not dialogue.mend(left):
            return None
        with Transaction(hosts, tell=dialogue.tell):
            pass  # entering has undone it
    ours = code.own()
    proposal = propose(inventory, hosts, ours, wheelhouse=wheelhouse)
    if not dialogue.approve(proposal):
        return None
    survey = proposal.survey
    if proposal.done:
        verify.addresses(transports, survey.plan)
        verify.pings(transports[0], survey.plan)
    else:
        survey = _apply(proposal, hosts, ours, wheelhouse, dialogue)
    measured = None if remeasure else _still_good(inventory, survey)
    if measured is None and seconds is not None:
        dialogue.tell("", "measure the link")
        measured = _measure(_record(survey, ours, LinkRecord()), survey, inventory, transports, seconds)
    paired = _record(survey, ours, measured or LinkRecord())
    _save(paired, transports)
    return Paired(paired, changed=not proposal.done)


def propose(inventory: Inventory, hosts: Sequence[Host], ours: Code, *, wheelhouse: str | None) -> Proposal:
    """Look at both nodes, and say what is to be changed. Changes nothing.

    Raises:
        RefusedError, FailedError: see `up`.
    """
    survey = surveying.survey(inventory, hosts)
    wanted = changes(survey.sites, survey.plan, ours, wheelhouse=wheelhouse)
    head, peer = each(zip(hosts, wanted, strict=True), lambda pair: transaction.look(pair[0], pair[1]).planned)
    return Proposal(survey, (head, peer))


def _apply(proposal: Proposal, hosts: Sequence[Host], ours: Code, wheelhouse: str | None, dialogue: Dialogue) -> Survey:
    """Make the changes, and verify what they came to before they are kept."""
    survey, transports = proposal.survey, [host.transport for host in hosts]
    with Transaction(hosts, tell=dialogue.tell) as change:
        # Each node makes its key first; only then is known which one the other has to let in.
        keys = {
            host.name: [plan for plan in plans if is_key(plan.change)]
            for host, plans in zip(hosts, proposal.planned, strict=True)
        }
        change.apply(keys)
        survey = Survey(_with_keys(survey.sites, transports), survey.plan)
        wanted = changes(survey.sites, survey.plan, ours, wheelhouse=wheelhouse)
        change.apply(
            {
                host.name: [
                    Planned(new, plan.state)
                    for new, plan in zip(news, plans, strict=True)
                    if plan not in keys[host.name]
                ]
                for host, news, plans in zip(hosts, wanted, proposal.planned, strict=True)
            }
        )
        dialogue.tell("", "verify addresses, full-size packets on each rail, the ranks' Python")
        verify.addresses(transports, survey.plan)
        verify.pings(transports[0], survey.plan)
        verify.code(
            transports, [site.python for site in survey.sites], [code_path(site, ours) for site in survey.sites]
        )
        change.commit()
    return survey


def _with_keys(sites: Sites, transports: Sequence[Transport]) -> Sites:
    keys = each(
        zip(transports, sites, strict=True), lambda pair: surveying.own_key(pair[0], f"{pair[1].home}/{KEY}.pub")
    )
    for site, key in zip(sites, keys, strict=True):
        if key is None:
            raise FailedError(
                f"{site.node.name}: {site.home}/{KEY}.pub: holds no key", "is ssh-keygen installed there?"
            )
    head, peer = (replace(site, public_key=key) for site, key in zip(sites, keys, strict=True))
    return head, peer


def _still_good(inventory: Inventory, survey: Survey) -> LinkRecord | None:
    """The last measurement of these rails, unless it failed: then whoever runs `up` has mended something."""
    try:
        before = record.load(inventory)
    except FailedError:
        return None  # damaged; it is written anew
    if before is None or before.rails != record.rails_of(survey.plan) or before.link.verdict == "below bar":
        return None
    return before.link if before.link.measurement else None


def _measure(
    paired: PairRecord, survey: Survey, inventory: Inventory, transports: Sequence[Transport], seconds: float
) -> LinkRecord:
    """The streams and RDMA writes, then two ranks over the rails; those only where something passes on both."""
    rdma = all(site.facts.has_tool("ib_write_bw") is True for site in survey.sites)
    taken = measure.measure(survey.plan, (transports[0], transports[1]), rdma=rdma, seconds=seconds)
    if taken.gbps is not None:
        taken = taken.with_collective(
            collective.measure(
                transports,
                [node.python for node in paired.nodes],
                [node.code for node in paired.nodes],
                [_of_ranks(variables, inventory) for variables in paired.environment],
                taken.wires,
            )
        )
    return judged(taken, judge(taken, inventory.link))


def remeasure(
    inventory: Inventory, transports: Sequence[Transport], *, seconds: float = 2.0
) -> tuple[PairRecord, Measurement, tuple[Finding, ...]]:
    """Measure the link of a pair that `up` has made, and put what it gave in the pair's record: `bench link`.

    Raises:
        RefusedError: these nodes are not a pair, or their link is not as `up` left it.
        FailedError: a node is lost.
    """
    before = record.load(inventory)
    if before is None:
        raise RefusedError("these nodes are not paired from here", "sparkctl up")
    survey = surveying.survey(inventory, [Host(transport) for transport in transports])
    if not survey.plan.adopted or before.rails != record.rails_of(survey.plan):
        raise RefusedError("the link is not as the last `sparkctl up` left it", "sparkctl up")
    measured = _measure(before, survey, inventory, transports, seconds)
    assert measured.measurement is not None  # judged gives it
    taken = measurement.from_json(measured.measurement)
    paired = before.model_copy(update={"link": measured})
    _save(paired, transports)
    return paired, taken, judge(taken, inventory.link)


def _of_ranks(variables: Sequence[environ.Variable], inventory: Inventory) -> dict[str, str]:
    """What a job's rank would have, the inventory's `env` included; its secrets have no say in how ranks talk."""
    own = {name: value for name, value in inventory.env.items() if not is_secret(name)}
    return environ.combine({}, environ.as_mapping(variables), own)


def judged(taken: Measurement, findings: Sequence[Finding]) -> LinkRecord:
    """The verdict on a link: below the bar if any check failed, ok only if its bandwidth could be held against the bar."""
    verdict: Verdict
    failed = [finding for finding in findings if finding.level is Level.FAIL]
    bandwidth = [finding for finding in findings if finding.check == "bandwidth"]
    telling = (failed or [one for one in bandwidth if one.level is not Level.OK] or bandwidth or list(findings))[0]
    if failed:
        verdict = "below bar"
    else:
        verdict = "ok" if bandwidth and all(one.level in (Level.OK, Level.WARN) for one in bandwidth) else "unverified"
    return LinkRecord(
        verdict=verdict,
        evidence=telling.evidence,
        fix=telling.fix,
        gbps=taken.gbps,
        method=taken.method,
        when=datetime.fromtimestamp(taken.time, UTC).isoformat(timespec="seconds"),
        measurement=taken.to_json(),
    )


def _record(survey: Survey, ours: Code, measured: LinkRecord) -> PairRecord:
    facts = (survey.sites[0].facts, survey.sites[1].facts)
    head, peer = (
        NodeRecord(
            name=site.node.name,
            address=site.node.host,
            python=site.python,
            home=site.home,
            code=code_path(site, ours),
        )
        for site in survey.sites
    )
    first, second = (
        tuple(one for one in environ.fabric(survey.plan, facts, rank=rank, port=_ANY_PORT) if one.name not in _PER_JOB)
        for rank in (0, 1)
    )
    return PairRecord(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        code=ours.hash,
        nodes=(head, peer),
        rails=record.rails_of(survey.plan),
        environment=(first, second),
        link=measured,
    )


def _save(paired: PairRecord, transports: Sequence[Transport]) -> None:
    """On both nodes, and here."""
    each(
        zip(transports, paired.nodes, strict=True),
        lambda pair: pair[0].put(f"{pair[1].home}/{record.NAME}", paired.as_json()),
    )
    record.save(paired)


def down(
    inventory: Inventory,
    transports: Sequence[Transport],
    dialogue: Dialogue,
    *,
    sudo: Sudo | None = None,
    force: bool = False,
    purge: bool = False,
) -> tuple[Outcome, ...]:
    """Undo all that `up` has changed on the nodes. Jobs' results stay, but with `purge` all of $SPARKCTL_HOME goes.

    A node that cannot be reached does not keep the other from being undone; its outcome says so. Safe to repeat.

    Args:
        force: put back also what somebody else has changed since.

    Raises:
        RefusedError: somebody else is changing a node, or a job runs; nothing was undone.
    """
    hosts = [Host(transport, sudo) for transport in transports]
    each(transports, _refuse_jobs)
    outcomes = transaction.undo(hosts, force=force, tell=dialogue.tell)
    each(
        [transport for transport, outcome in zip(transports, outcomes, strict=True) if outcome.complete],
        lambda transport: _forget(transport, purge=purge),
    )
    if all(outcome.complete for outcome in outcomes):
        record.forget(inventory)
    return outcomes


def _refuse_jobs(transport: Transport) -> None:
    units = ["systemctl", "--user", "list-units", "--plain", "--no-legend", "--state=active", "sparkctl-job@*"]
    try:
        shown = transport.run(units, timeout=15.0).stdout.decode(errors="replace")
    except FailedError:
        return  # whoever undoes will say why it cannot be reached
    running = [line.split()[0] for line in shown.splitlines() if line.strip()]
    if running:
        jobs = ", ".join(name.removeprefix("sparkctl-job@").removesuffix(".service") for name in running)
        raise RefusedError(
            f"{transport.name}: still runs {jobs}", f"`sparkctl stop {jobs.partition(',')[0]}`, then again"
        )


def _forget(transport: Transport, *, purge: bool) -> None:
    home = transport.home()
    transport.run(["rm", "-f", "--", f"{home.sparkctl}/{record.NAME}"])
    if not purge:
        return
    theirs, ours = PurePosixPath(home.user), PurePosixPath(home.sparkctl)
    if ours == theirs or ours in theirs.parents:
        raise RefusedError(f"{transport.name}: $SPARKCTL_HOME is {ours}, not a folder of its own", "remove it by hand")
    result = transport.run(["rm", "-rf", "--", home.sparkctl], timeout=600.0)
    if result.status:
        said = result.stderr.decode(errors="replace").strip().splitlines()
        raise FailedError(f"{transport.name}: {said[0] if said else home.sparkctl}", "remove it there by hand")
