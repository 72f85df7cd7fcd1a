"""The pair's record: what `up` made and verified. $SPARKCTL_HOME/pair.json on both nodes and where the command ran.

{"version": 1, "when": "2026-11-23T07:00:00+00:00", "code": "HASH",
 "nodes": [{"name", "address", "python", "home", "code"}, ...],            head first; paths on that node
 "rails": [{"subnet", "mtu", "ends": [{"interface", "address", "hca"}, ...]}, ...],
 "environment": [{"NCCL_IB_HCA": ...}, {...}],                             by rank; the rendezvous' port is the job's
 "link": {"verdict": "ok" | "below bar" | "unverified", "evidence", "fix", "gbps", "method", "when"}}
"""

from __future__ import annotations

import os
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.environ import Variable
from cluster.errors import FailedError
from cluster.files import write_atomically
from cluster.inventory import Inventory

if TYPE_CHECKING:
    from cluster.link import LinkPlan

NAME = "pair.json"
Verdict = Literal["ok", "below bar", "unverified"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)  # a later version may know more


class NodeRecord(_Frozen):
    """A node: how the inventory reaches it, and where things are there."""

    name: str
    address: str | None  # the inventory's `host`; None: the machine on which the command ran
    python: str
    home: str  # its $SPARKCTL_HOME
    code: str  # the folder of our code


class EndRecord(_Frozen):
    """A rail's end on one node."""

    interface: str
    address: IPv4Interface
    hca: str


class RailRecord(_Frozen):
    """A rail, its ends by rank; `mtu` in bytes."""

    subnet: IPv4Network
    mtu: int
    ends: tuple[EndRecord, EndRecord]


class LinkRecord(_Frozen):
    """What the last measurement of the link said; `gbps` is that of both rails at once, in Gbit/s.

    `measurement` is all of it, as cluster.measurement.Measurement.to_json writes it.
    """

    verdict: Verdict = "unverified"
    evidence: str = "the throughput of the link has not been measured"
    fix: str = ""
    gbps: float | None = None
    method: str | None = None
    when: str | None = None
    measurement: str | None = Field(default=None, repr=False)


class PairRecord(_Frozen):
    """A pair that `up` has made."""

    version: Literal[1] = 1
    when: str
    code: str
    nodes: tuple[NodeRecord, NodeRecord]
    rails: tuple[RailRecord, RailRecord]
    environment: tuple[tuple[Variable, ...], tuple[Variable, ...]]
    link: LinkRecord = LinkRecord()

    def is_of(self, inventory: Inventory) -> bool:
        """Whether it tells of this inventory's nodes."""
        return [(node.name, node.address) for node in self.nodes] == [
            (node.name, node.host) for node in inventory.nodes
        ]

    def as_json(self) -> bytes:
        """As the file holds it."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def rails_of(plan: LinkPlan) -> tuple[RailRecord, RailRecord]:
    """The rails of a plan, as the record has them."""
    first, second = (
        RailRecord(
            subnet=rail.subnet,
            mtu=rail.mtu,
            ends=tuple(EndRecord(interface=end.interface, address=end.address, hca=end.hca) for end in rail.ends),
        )
        for rail in plan.rails
    )
    return first, second


def here() -> Path:
    """The file on this machine."""
    return Path(os.environ.get("SPARKCTL_HOME") or "~/.sparkctl").expanduser() / NAME


def load(inventory: Inventory) -> PairRecord | None:
    """What this machine knows of the inventory's pair; None: nothing, `up` has not been run here.

    Raises:
        FailedError: the file is damaged.
    """
    path = here()
    try:
        record = PairRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise FailedError(f"{path}: cannot be read ({type(error).__name__})", "`sparkctl up` writes it anew") from None
    return record if record.is_of(inventory) else None


def save(record: PairRecord) -> None:
    """Write it on this machine.

    Raises:
        FailedError: it cannot be written.
    """
    path = here()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, record.as_json())
    except OSError as error:
        raise FailedError(f"{path}: cannot be written ({error.strerror})", "mend that, then `sparkctl up`") from None


def forget(inventory: Inventory) -> None:
    """Remove it from this machine, if it is this pair's or nobody's."""
    path = here()
    try:
        known = PairRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        path.unlink(missing_ok=True)
        return
    if known.is_of(inventory):
        path.unlink(missing_ok=True)
