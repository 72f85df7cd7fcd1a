"""A pair is examined: both nodes are looked at, the doctor is told what was seen; and the archive that an owner can hand on."""

from __future__ import annotations

import io
import json
import re
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster import code, doctor, measurement, probe, record
from cluster import facts as fact
from cluster.doctor import Clock, Log
from cluster.errors import FailedError, SparkctlError
from cluster.facts import Facts, Unknown, known
from cluster.files import replacing
from cluster.finding import Finding
from cluster.inventory import Inventory
from cluster.measurement import Measurement
from cluster.survey import PROBE_SECONDS, each
from cluster.transport import Transport
from cluster.yamlfile import SECRET_NAME

_LOGS = 4  # the newest of each node
_LOG_BYTES = 64 << 10
_NEWEST = ("sh", "-c", 'cd "$0" 2>/dev/null && ls -t -- */*.log 2>/dev/null')

# What tells who somebody is, or would let somebody in.
_IDENTITIES = (
    (re.compile(r"\b([0-9a-f]{2}(?::[0-9a-f]{2}){2})(?::[0-9a-f]{2}){3}\b", re.IGNORECASE), r"\1:xx:xx:xx"),
    (re.compile(r"GPU-[0-9a-f]{8}-[0-9a-f-]{27}", re.IGNORECASE), "GPU-(left out)"),
    (re.compile(r"(DGX_SERIAL_NUMBER=)[^\\\n]*"), r"\1(left out)"),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "(left out)"),
    (re.compile(rf"(?im)^(\W*[\w-]*(?:{SECRET_NAME.pattern})[\w-]*\W*[=:]).*$"), r"\1 (left out)"),
)
_IDENTITY_FACTS = ("machine_id", "boot_id", "neighbours")


@dataclass(frozen=True)
class Visit:
    """What was seen of one node: its facts, our two clocks side by side, the probe's answer as it came, ends of logs."""

    facts: Facts | Unknown
    clock: Clock | None = None
    answer: bytes = b""
    logs: tuple[Log, ...] = ()


@dataclass(frozen=True)
class Checkup:
    """Both visits, and what the doctor found."""

    visits: tuple[Visit, Visit]
    findings: tuple[Finding, ...]


def checkup(inventory: Inventory, transports: Sequence[Transport]) -> Checkup:
    """Look at both nodes and examine what was seen. Changes nothing; a node that is not reached is a finding."""
    if inventory.embedded:
        visit = _visit(inventory, transports, 0)
        visits = (visit, visit)
    else:
        head, peer = each((0, 1), lambda rank: _visit(inventory, transports, rank))
        visits = (head, peer)
    clocks = (visits[0].clock, visits[1].clock)
    findings = doctor.examine(
        inventory,
        (visits[0].facts, visits[1].facts),
        code=code.own().hash,
        measurement=_last(inventory),
        clocks=(clocks[0], clocks[1]) if clocks[0] and clocks[1] else None,
        logs=[log for visit in dict.fromkeys(visits) for log in visit.logs],
    )
    return Checkup(visits, findings)


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
        return Visit(facts, clock, result.stdout, _logs(transport, facts))
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


def bundle(checked: Checkup, inventory: Inventory, path: Path) -> None:
    """Write the archive (tar.gz): facts, findings and logs, without what identifies the owner or lets somebody in.

    Raises:
        FailedError: the file cannot be written.
    """
    files = {"findings.json": json.dumps([asdict(one) for one in checked.findings], indent=1)}
    for node, visit in zip(inventory.nodes, checked.visits, strict=True):
        if isinstance(visit.facts, Unknown):
            files[f"{node.name}/unreachable.txt"] = visit.facts.reason
            continue
        files[f"{node.name}/facts.json"] = _shared(visit.answer)
        for log in visit.logs:
            files[f"{node.name}/{log.name}"] = log.text
    try:
        with replacing(path) as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
            for name, text in files.items():
                data = redacted(text).encode()
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    except OSError as error:
        raise FailedError(f"{path}: {error.strerror}", "name another file") from None


def _shared(answer: bytes) -> str:
    """The probe's answer, less the facts that only identify."""
    start = answer.index(b'{"sparkctl_probe"')
    found, _ = json.JSONDecoder().raw_decode(answer[start:].decode(errors="replace"))
    kept = {name: _lines_redacted(value) for name, value in found["facts"].items() if name not in _IDENTITY_FACTS}
    return json.dumps({**found, "facts": kept}, indent=1)


def _lines_redacted(value: object) -> object:
    """Texts inside of JSON have lines of their own."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, list):
        return [_lines_redacted(item) for item in value]
    if isinstance(value, dict):
        return {name: _lines_redacted(item) for name, item in value.items()}
    return value


def redacted(text: str) -> str:
    """A text without hardware addresses, serial numbers, and the values of what is named like a secret."""
    for pattern, instead in _IDENTITIES:
        text = pattern.sub(instead, text)
    return text
