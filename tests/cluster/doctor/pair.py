"""A pair of Sparks in perfect health, for a test to break one thing of it."""

from __future__ import annotations

from typing import Any

from cluster.doctor import Clock, examine
from cluster.facts import Facts, Unknown
from cluster.finding import Finding, Level
from cluster.inventory import Inventory, Link, Node
from cluster.measurement import Collective, Flow, Measurement, Message, Method, Ping, Run, Wire
from tests.cluster.fixtures import PORTS, Spark

CODE = "0123456789abcdef"
FIRST, SECOND = PORTS[0]
HCAS = ("rocep1s0f0", "roceP2p1s0f0")
NAMES = ("spark-a", "spark-b")
UNITS = (
    "OOMScoreAdjust=-1000\nId=ssh.service\nLoadState=loaded\nActiveState=active\nUnitFileState=enabled\n\n"
    "OOMScoreAdjust=0\nId=earlyoom.service\nLoadState=loaded\nActiveState=active\nUnitFileState=enabled\n"
)
PACKAGES = {
    "python": "/home/alice/.sparkctl/venv/bin/python",
    "version": "3.12.3",
    "distributions": {"torch": "2.13.0", "transformers": "5.23.0", "nvidia-nccl-cu13": "2.30.4"},
}
HOME = {"path": "/home/alice/.sparkctl", "mode": 0o700, "entries": ["code"], "code": [CODE], "jobs": [], "unit": None}
HEALTHY = {
    "units": UNITS,
    "earlyoom": 'EARLYOOM_ARGS="-m 2 -s 80"\n',
    "swaps": "Filename\tType\tSize\tUsed\tPriority\n",
    "packages": PACKAGES,
    "sparkctl": HOME,
}


def box(rank: int, *, mtu: int = 9000, changes: dict[str, Any] | None = None, **state: Any) -> Spark:
    """The head or the peer after `sparkctl up`, with other facts in place of the healthy ones."""
    spark = Spark(NAMES[rank], rank + 1, changes=HEALTHY | (changes or {}), **state)
    rails = ((FIRST, f"192.168.100.{10 + rank}/24"), (SECOND, f"192.168.101.{10 + rank}/24"))
    return spark.configured(*rails, mtu=mtu)


def fact(rank: int, name: str) -> Any:
    """A healthy fact as the probe tells it, for a test to change a part of it."""
    return (box(rank).values() | HEALTHY)[name]


def inventory(env: dict[str, str] | None = None, **link: Any) -> Inventory:
    nodes = tuple(Node(name=name, host=f"192.168.1.2{number}", user="alice") for number, name in enumerate(NAMES, 1))
    return Inventory(nodes=nodes, env=env or {}, link=Link(**link))


def examined(
    head: Spark | Facts | Unknown | None = None, peer: Spark | Facts | Unknown | None = None, **known: Any
) -> tuple[Finding, ...]:
    """What the doctor finds; a node that is not given is healthy, and so is the measurement."""
    nodes = [given if given is not None else box(rank) for rank, given in enumerate((head, peer))]
    first, second = (node.facts() if isinstance(node, Spark) else node for node in nodes)
    asked = {
        "inventory": inventory(),
        "code": CODE,
        "measurement": measured(),
        "clocks": (Clock(0.1, 0.1), Clock(0.0, 0.1)),
    }
    asked |= known
    return examine(asked.pop("inventory"), (first, second), **asked)


def of(findings: tuple[Finding, ...], check: str) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


def bad(findings: tuple[Finding, ...]) -> list[Finding]:
    """What is wrong."""
    return [finding for finding in findings if finding.level in (Level.WARN, Level.FAIL)]


# Measurements.

WIRES = tuple(
    Wire((name, name), (f"192.168.10{rail}.10", f"192.168.10{rail}.11"), (HCAS[rail], HCAS[rail]), 9000)
    for rail, name in enumerate((FIRST, SECOND))
)


def runs(method: Method, rates: tuple[float, float], back: tuple[float, float] | None = None) -> tuple[Run, ...]:
    """Both rails there and back, and each alone at the rate that it has with the other."""
    both = [Run(method, sender, tuple(_flow(method, rail, rate[rail]) for rail in (0, 1)))
            for sender, rate in enumerate((rates, back or rates))]  # fmt: skip
    return (*both, *(Run(method, 0, (_flow(method, rail, rates[rail]),)) for rail in (0, 1)))


def _flow(method: Method, rail: int, gbps: float) -> Flow:
    if method == "rdma":
        return Flow(rail, gbps)
    size = int(gbps * 1e9 / 8)
    return Flow(rail, gbps, "", size, size, 1.0, (FIRST, SECOND)[rail])


def measured(
    rdma: tuple[float, float] | None = (92.57, 97.28), tcp: tuple[float, float] = (14.0, 15.0), **other: Any
) -> Measurement:
    """A measurement of the healthy pair's link; without `rdma` by streams alone."""
    places = [(rail, sender) for rail in (0, 1) for sender in (0, 1)]
    given: dict[str, Any] = {
        "pings": tuple(Ping(*place, 9000, 3, 3, 0.05) for place in places),
        "messages": tuple(Message(*place, 8 << 20, 0.02, intact=True) for place in places),
        "runs": runs("tcp", tcp) + (runs("rdma", rdma) if rdma else ()),
        "collective": Collective("nccl", 1 << 30, 19.2),
    }
    return Measurement(1781085600.0, NAMES, (WIRES[0], WIRES[1]), **(given | other))
