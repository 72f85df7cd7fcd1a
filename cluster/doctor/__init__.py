"""What is wrong with a pair, and what to do: every check over what is known of it, each with its evidence and its fix. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster import link as linking
from cluster.doctor import gpu, link, logs, memory, reach, versions
from cluster.doctor.case import Case, Check, Clock, Log
from cluster.errors import RefusedError
from cluster.facts import Facts, Unknown
from cluster.finding import Finding, Level
from cluster.inventory import Inventory
from cluster.link import LinkPlan
from cluster.measurement import Measurement

__all__ = ["CHECKS", "ENTRIES", "Case", "Check", "Clock", "Entry", "Log", "examine"]

CHECKS: tuple[Check, ...] = (
    *reach.CHECKS,
    *link.CHECKS,
    *memory.CHECKS,
    *gpu.CHECKS,
    *versions.CHECKS,
    *logs.CHECKS,
)


def examine(
    inventory: Inventory,
    nodes: tuple[Facts | Unknown, Facts | Unknown],
    *,
    code: str,
    measurement: Measurement | None = None,
    clocks: tuple[Clock, Clock] | None = None,
    logs: Sequence[Log] = (),
) -> tuple[Finding, ...]:
    """Everything that the checks find, in their order.

    A check that could not look gives a finding of level unknown that says why. The embedded pair is one machine: its nodes are
    looked at once, and there is no link to look at.

    Args:
        nodes: the facts of the head and of the peer; Unknown, with the reason, where a node could not be reached.
        code: the hash of our own code (cluster.code), which `up` ships to the nodes.
        measurement: the last one of the link.
        clocks: how far each node's is ahead of ours.
        logs: the ends of logs, of jobs say.
    """
    case = Case(inventory, nodes, _planned(inventory, nodes), code, measurement, clocks, tuple(logs))
    if inventory.embedded:
        return _of_one_machine(case)
    return tuple(finding for check in CHECKS for finding in check.look(case))


def _planned(inventory: Inventory, nodes: tuple[Facts | Unknown, Facts | Unknown]) -> LinkPlan | RefusedError | Unknown:
    head, peer = nodes
    for node, facts in zip(inventory.nodes, nodes, strict=True):
        if isinstance(facts, Unknown):
            return Unknown(f"{node.name} could not be looked at")
        for fact in (facts.nics, facts.roce):  # without them a plan is refused as if there were nothing
            if isinstance(fact, Unknown):
                return Unknown(f"{node.name}: {fact.reason}")
    assert isinstance(head, Facts) and isinstance(peer, Facts)
    try:
        return linking.plan(head, peer, inventory.link)
    except RefusedError as error:
        return error


def _of_one_machine(case: Case) -> tuple[Finding, ...]:
    head = case.nodes[0]
    one = replace(case, nodes=(head, Unknown("the same machine")))
    checks = [*memory.CHECKS, *gpu.CHECKS, *logs.CHECKS]
    found = [finding for check in checks for finding in check.look(one)]
    return (Finding("cable", Level.OK, None, "an embedded pair: both nodes are this machine, without a cable"), *found)


@dataclass(frozen=True)
class Entry:
    """Something that breaks on a Spark, by its number in the list of public facts; the checks that see it, or why none can."""

    number: int
    what: str
    checks: tuple[str, ...] = ()
    unseen: str = ""


ENTRIES = (
    Entry(1, "13 Gb/s over a healthy cable: the ConnectX-7 has not initialised well", ("bandwidth",)),
    Entry(2, "3 GB/s by NCCL though RDMA is fine: a development branch, or a power cycle is due", ("collective",)),
    Entry(3, "half the bandwidth: one twin in NCCL_IB_HCA", ("hca", "bandwidth", "collective")),
    Entry(4, "out of memory, the box freezes", ("swap", "earlyoom", "sshd", "kernel log")),
    Entry(5, "free memory less than desired: a warm page cache", ("page cache", "logs")),
    Entry(6, "the GID of an address has moved", ("gid", "logs")),
    Entry(7, "both twins on one subnet", ("subnet",)),
    Entry(8, "addresses vanish after a reboot", ("address",)),
    Entry(9, "ufw blocks the link", ("firewall",)),
    Entry(10, "nvidia-smi fails after an update", ("driver", "logs")),
    Entry(11, "PCIe Gen5 x2 on one function of the NIC", ("pcie",)),
    Entry(12, "the GPU stuck at 500 to 850 MHz", ("gpu clock",)),
    Entry(13, "kernel 7.0.0-1019 with CmaTotal 0: ibv_reg_mr fails", ("cma", "memlock", "logs")),
    Entry(
        14,
        "a model loads slowly through mmap",
        unseen="how a program reads its files shows only while it does; our own loader reads eagerly",
    ),
    Entry(
        15,
        "versions differ between the boxes",
        ("driver version", "cuda", "kernel", "firmware", "nccl", "torch", "transformers"),
    ),
    Entry(16, "a conflict of names on mDNS, or no ~/.ssh", ("names", "ssh folder")),
    Entry(17, "an MTU of 9000 at one end and 1500 at the other", ("mtu",)),
)
