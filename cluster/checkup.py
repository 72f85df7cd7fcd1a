"""A pair is examined: both nodes are looked at, the doctor is told what was seen; and the archive that an owner can hand on."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import bundle, code, doctor, measurement, probe, record
from cluster import facts as fact
from cluster.doctor import Clock, Log
from cluster.errors import FailedError, SparkctlError
from cluster.facts import Facts, Unknown, known
from cluster.files import write_atomically
from cluster.finding import Finding
from cluster.inventory import Inventory
from cluster.measurement import Measurement
from cluster.survey import PROBE_SECONDS, each
from cluster.transport import Transport

_LOGS = 4  # the newest of each node
_LOG_BYTES = 64 << 10
_NEWEST = ("sh", "-c", 'cd "$0" 2>/dev/null && ls -t -- */*.log 2>/dev/null')


@dataclass(frozen=True)
class Visit:
    """What was seen of one node: its facts, our two clocks side by side, ends of logs."""

    facts: Facts | Unknown
    clock: Clock | None = None
    logs: tuple[Log, ...] = ()


@dataclass(frozen=True)
class Checkup:
    """Both visits (of the embedded pair one, twice), what was measured of the link before, and what the doctor found."""

    visits: tuple[Visit, Visit]
    findings: tuple[Finding, ...]
    measurement: Measurement | None = None


def checkup(inventory: Inventory, transports: Sequence[Transport]) -> Checkup:
    """Look at both nodes and examine what was seen. Changes nothing; a node that is not reached is a finding."""
    if inventory.embedded:
        visit = _visit(inventory, transports, 0)
        visits = (visit, visit)
    else:
        head, peer = each((0, 1), lambda rank: _visit(inventory, transports, rank))
        visits = (head, peer)
    clocks = (visits[0].clock, visits[1].clock)
    measured = _last(inventory)
    findings = doctor.examine(
        inventory,
        (visits[0].facts, visits[1].facts),
        code=code.own().hash,
        measurement=measured,
        clocks=(clocks[0], clocks[1]) if clocks[0] and clocks[1] else None,
        logs=[log for visit in dict.fromkeys(visits) for log in visit.logs],
    )
    return Checkup(visits, findings, measured)


def _last(inventory: Inventory) -> Measurement | None:
    try:
        known_pair = None if inventory.embedded else record.load(inventory)
        text = known_pair.link.measurement if known_pair else None
        return measurement.from_json(text) if text else None
    except FailedError:
        return None  # damaged; `up` writes it anew


def _visit(inventory: Inventory, transports: Sequence[Transport], rank: int) -> Visit:
    node, transport = inventory.nodes[rank], transports[rank]
    try:
        transport.home()  # connecting must not count as the clock's
        asked = time.time()
        result = transport.run(probe.ARGV, stdin=probe.script(python_path=node.python), timeout=PROBE_SECONDS)
        answered = time.time()
        facts = fact.parse(result.stdout, node.name)
        clock = Clock(*fact.clock_skew(facts, asked=asked, answered=answered))
        return Visit(facts, clock, _logs(transport, facts))
    except SparkctlError as error:
        return Visit(Unknown(error.message))


def _logs(transport: Transport, facts: Facts) -> tuple[Log, ...]:
    home = known(facts.sparkctl, None)
    if home is None or not home.jobs:
        return ()
    jobs = f"{home.path}/jobs"
    listed = transport.run([*_NEWEST, jobs], timeout=15.0).stdout.decode(errors="replace").splitlines()
    names = [name for name in listed if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+\.log", name)][:_LOGS]
    ends = [transport.run(["tail", "-c", str(_LOG_BYTES), "--", f"{jobs}/{name}"], timeout=15.0) for name in names]
    return tuple(
        Log(facts.node, name, end.stdout.decode(errors="replace")) for name, end in zip(names, ends, strict=True)
    )


def write_bundle(checked: Checkup, inventory: Inventory, path: Path) -> None:
    """Write the archive that an owner can hand on (see cluster.bundle): a node that was not reached is a finding in it.

    Raises:
        FailedError: the file cannot be written.
    """
    seen = list(dict.fromkeys(checked.visits))
    archive = bundle.render(
        inventory,
        [visit.facts for visit in seen if not isinstance(visit.facts, Unknown)],
        checked.findings,
        measurement=checked.measurement,
        logs=[log for visit in seen for log in visit.logs],
    )
    try:
        write_atomically(path, archive)
    except OSError as error:
        raise FailedError(f"{path}: {error.strerror}", "name another file") from None
