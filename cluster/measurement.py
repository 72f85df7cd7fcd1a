"""What a link really gave, as it was measured: frozen, and the same again out of JSON. Pure.

Ranks stand for nodes (0 the head, 1 the peer), and `rail` for the index of a rail. Rates are Gbit/s, sizes bytes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from cluster.errors import FailedError
from cluster.link import LinkPlan

Method = Literal["tcp", "rdma"]

SMALL = 84  # bytes: an echo request that every MTU lets through, sent where those of full size are lost


@dataclass(frozen=True)
class Wire:
    """A rail as it was measured: by rank its interfaces, addresses and RoCE devices."""

    interfaces: tuple[str, str]
    addresses: tuple[str, str]
    hcas: tuple[str, str]
    mtu: int


@dataclass(frozen=True)
class Ping:
    """Echo requests that may not be fragmented; `size` is the whole IPv4 packet's. `error` is ping's own word on a failure."""

    rail: int
    sender: int
    size: int
    sent: int
    received: int
    milliseconds: float | None = None  # the mean round trip
    error: str = ""


@dataclass(frozen=True)
class Flow:
    """What one rail carried in a run; of TCP also the bytes at both ends, the seconds, and the interface that they came in by."""

    rail: int
    gbps: float
    error: str = ""
    sent: int | None = None
    received: int | None = None
    seconds: float | None = None
    arrived: str | None = None


@dataclass(frozen=True)
class Run:
    """One rail alone, or both at once, in one direction: TCP streams of our own, or RDMA writes by ib_write_bw."""

    method: Method
    sender: int
    flows: tuple[Flow, ...]

    @property
    def gbps(self) -> float:
        """Of all its rails together."""
        return sum(flow.gbps for flow in self.flows)

    @property
    def rails(self) -> tuple[int, ...]:
        """The rails that it used."""
        return tuple(flow.rail for flow in self.flows)

    @property
    def errors(self) -> tuple[str, ...]:
        """What failed, once each."""
        return tuple(dict.fromkeys(flow.error for flow in self.flows if flow.error))


@dataclass(frozen=True)
class Message:
    """One message that was sent as a whole; `intact`: it arrived as it left."""

    rail: int
    sender: int
    size: int
    seconds: float
    intact: bool
    error: str = ""


@dataclass(frozen=True)
class Collective:
    """A collective operation between the two ranks; `bus` in GB/s, as nccl-tests counts it (of two ranks: size over time).

    `moved` is how many bytes each rank had to send, `carried` how many the rails did as the kernel and the RoCE devices count, and
    `astray` the interface besides them that sent most. `error`: why there is no figure, or none to trust.
    """

    backend: str  # nccl or gloo
    size: int
    bus: float
    moved: int = 0
    carried: int | None = None
    astray: str = ""
    error: str = ""


@dataclass(frozen=True)
class Measurement:
    """Everything that one measurement saw. `time` in seconds since 1970, `nodes` and `wires` by rank and by rail."""

    time: float
    nodes: tuple[str, str]
    wires: tuple[Wire, Wire]
    pings: tuple[Ping, ...] = ()
    runs: tuple[Run, ...] = ()
    messages: tuple[Message, ...] = ()
    collective: Collective | None = None

    @property
    def method(self) -> Method | None:
        """How the link's throughput was found: by RDMA where that worked in both directions, else by TCP, else not at all."""
        methods: tuple[Method, ...] = ("rdma", "tcp")
        return next((one for one in methods if self.both(one) and not any(run.errors for run in self.both(one))), None)

    @property
    def gbps(self) -> float | None:
        """The throughput of both rails at once, in the slower direction; None where no method has found it."""
        return min(run.gbps for run in self.both(self.method)) if self.method else None

    def both(self, method: Method) -> tuple[Run, ...]:
        """The runs over both rails at once."""
        return tuple(run for run in self.runs if run.method == method and len(run.flows) == 2)

    def alone(self, method: Method) -> tuple[Run, ...]:
        """The runs over one rail."""
        return tuple(run for run in self.runs if run.method == method and len(run.flows) == 1)

    def is_of(self, plan: LinkPlan) -> bool:
        """Whether it tells of the link as it is planned now: same nodes, interfaces, addresses and MTU."""
        return self.wires == wires(plan) and self.nodes == nodes(plan)

    def with_collective(self, collective: Collective) -> Measurement:
        """The same with what an all-reduce over the link gave."""
        return dataclasses.replace(self, collective=collective)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def from_json(text: str | bytes) -> Measurement:
    """Read what Measurement.to_json wrote.

    Raises:
        FailedError: it is something else, or damaged.
    """
    from pydantic import TypeAdapter, ValidationError  # heavy, and only records are read

    try:
        return TypeAdapter(Measurement).validate_json(text)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])[:80]
        raise FailedError(
            f"the record of the last measurement is damaged{f' ({where})' if where else ''}", "`sparkctl bench link`"
        ) from None


def nodes(plan: LinkPlan) -> tuple[str, str]:
    """The names of a plan's nodes, by rank."""
    return plan.rails[0].head.node, plan.rails[0].peer.node


def wires(plan: LinkPlan) -> tuple[Wire, Wire]:
    """The rails of a plan as a measurement names them."""
    first, second = (
        Wire(
            (rail.head.interface, rail.peer.interface),
            (str(rail.head.address.ip), str(rail.peer.address.ip)),
            (rail.head.hca, rail.peer.hca),
            rail.mtu,
        )
        for rail in plan.rails
    )
    return first, second
