"""The link as the nodes show it: cable, twins, PCIe, addresses, MTU, GIDs, what NCCL is told, firewalls. Pure.

Much of it the plan of the link has found already (cluster.link, cluster.cable); here it is put beside what is in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Network

from cluster import cable
from cluster.cable import Twin
from cluster.doctor import bandwidth
from cluster.doctor.case import Case, Check, of_the_link
from cluster.errors import RefusedError
from cluster.facts import Facts, Nic, RoceDevice, Unknown, known
from cluster.finding import Finding, Level
from cluster.link import End, LinkPlan
from cluster.measurement import Measurement

Both = tuple[Facts, Facts]
_DROPS = re.compile(r"hook input [^\n]*policy drop")  # in what `nft list ruleset` prints

PCIE_SPEED, PCIE_WIDTH = 32.0, 4  # GT/s and lanes of each of the ConnectX-7's functions on a Spark
_FIRMWARE = "sudo fwupdmgr refresh && sudo fwupdmgr update && sudo reboot"


# What the plan has found.


def _cable(case: Case) -> Iterator[Finding]:
    if isinstance(case.plan, RefusedError):
        yield Finding("cable", Level.FAIL, None, case.plan.message, case.plan.fix)
    elif isinstance(case.plan, Unknown):
        yield Finding("cable", Level.UNKNOWN, None, case.plan.reason)
    else:
        found = [finding for finding in case.plan.findings if finding.check in ("cable", "port")]
        ends = [" and ".join(end.interface for end in case.plan.ends(rank)) for rank in (0, 1)]
        evidence = f"{case.names[0]}: {ends[0]}; {case.names[1]}: {ends[1]}"
        yield from found or [Finding("cable", Level.OK, None, evidence)]


def _planned(name: str, in_order: Callable[[LinkPlan, Both], str]) -> Check:
    """What the plan found under a name; if that is nothing, what is in order."""

    def look(case: Case, plan: LinkPlan, nodes: Both) -> Iterable[Finding]:
        found = [finding for finding in plan.findings if finding.check == name]
        return found or [Finding(name, Level.OK, None, in_order(plan, nodes))]

    return of_the_link(name, look)


def _carriers(plan: LinkPlan, nodes: Both) -> str:
    return f"both twins of {nodes[0].node} and of {nodes[1].node} are up and have a carrier"


def _speeds(plan: LinkPlan, nodes: Both) -> str:
    nics = [nic for facts, nic, _ in _ends(plan, nodes) if nic]
    speeds = {nic.name: known(nic.ethtool_speed, None) or nic.speed for nic in nics}
    return ", ".join(f"{name} {speed}Mb/s" for name, speed in speeds.items())


def _devices(plan: LinkPlan, nodes: Both) -> str:
    return f"{', '.join(dict.fromkeys(end.hca for _, _, end in _ends(plan, nodes)))} are ACTIVE"


def _subnets(plan: LinkPlan, nodes: Both) -> str:
    return f"the rails have {plan.rails[0].subnet} and {plan.rails[1].subnet}"


def _ends(plan: LinkPlan, nodes: Both) -> Iterator[tuple[Facts, Nic | None, End]]:
    """Every end of the plan, with its node and interface."""
    for rank, facts in enumerate(nodes):
        yield from ((facts, facts.nic(end.interface), end) for end in plan.ends(rank))


def _addresses(case: Case, plan: LinkPlan, nodes: Both) -> Iterator[Finding]:
    found = [finding for finding in plan.findings if finding.check == "address"]
    absent = [f"{facts.node}: {end.interface}" for facts, nic, end in _ends(plan, nodes) if not _has(nic, end)]
    hidden = [nic.addresses.reason for _, nic, _ in _ends(plan, nodes) if nic and isinstance(nic.addresses, Unknown)]
    if hidden:
        yield Finding("address", Level.UNKNOWN, None, f"the addresses: {hidden[0]}")
    elif found:
        yield from found
    elif not absent:
        evidence = ", ".join(f"{end.interface} {end.address.ip}" for _, _, end in _ends(plan, nodes))
        yield Finding("address", Level.OK, None, f"{evidence}, and they last over a reboot")
    else:
        evidence = f"no address of the link on {', '.join(absent)}: the pair is not up"
        yield Finding("address", Level.WARN, None, evidence, "sparkctl up")


def _has(nic: Nic | None, end: End) -> bool:
    return nic is not None and end.address in nic.ipv4


def _mtu(case: Case, plan: LinkPlan, nodes: Both) -> Iterator[Finding]:
    even = []
    for rail in plan.rails:
        mtus = [
            nic.mtu if nic else None
            for nic in (facts.nic(end.interface) for facts, end in zip(nodes, rail.ends, strict=True))
        ]
        if mtus[0] == mtus[1]:
            even.append(f"{mtus[0]} on rail {rail.index}")
            continue
        places = [f"{mtu} on {end.node}'s {end.interface}" for mtu, end in zip(mtus, rail.ends, strict=True)]
        evidence = f"rail {rail.index}: the MTU is {' and '.join(places)}: large messages hang, small ones pass"
        yield Finding("mtu", Level.FAIL, None, evidence, "sparkctl up")
    notes = [finding for finding in plan.findings if finding.check == "mtu"]
    yield from notes
    if len(even) == 2 and not notes:
        yield Finding("mtu", Level.OK, None, f"the MTU is {' and '.join(even)}, at both ends")


# PCIe.


def _pcie(case: Case, plan: LinkPlan, nodes: Both) -> Iterator[Finding]:
    for rank, facts in enumerate(nodes):
        if isinstance(facts.pcie, Unknown):
            yield Finding(
                "pcie", Level.UNKNOWN, facts.node, f"the PCIe links: {facts.pcie.reason}", "sudo lspci -vv -d 15b3:"
            )
            continue
        ours = {
            twin.device.pci for twin in _twins(facts) if twin.nic.name in {end.interface for end in plan.ends(rank)}
        }
        slow = [link for link in facts.pcie if link.width < PCIE_WIDTH or link.speed < PCIE_SPEED]
        for link in slow:
            evidence = (
                f"{link.address} runs at {link.speed:g} GT/s x{link.width}, not at {PCIE_SPEED:g} GT/s x{PCIE_WIDTH}"
            )
            level = Level.FAIL if link.address in ours else Level.WARN
            yield Finding("pcie", level, facts.node, f"{evidence}: its rail is slow", f"on {facts.node}: {_FIRMWARE}")
        if not slow and ours <= {link.address for link in facts.pcie}:
            evidence = f"{len(facts.pcie)} links at {PCIE_SPEED:g} GT/s x{PCIE_WIDTH}"
            yield Finding("pcie", Level.OK, facts.node, evidence)
        elif not slow:
            yield Finding("pcie", Level.UNKNOWN, facts.node, "the PCIe links are not shown", "sudo lspci -vv -d 15b3:")


def _twins(facts: Facts) -> list[Twin]:
    return [twin for twins in cable.sockets(facts).values() for twin in twins]


# What NCCL goes by.


def _gid(case: Case, plan: LinkPlan, nodes: Both) -> Iterator[Finding]:
    forced = case.inventory.env.get("NCCL_IB_GID_INDEX")
    for rank, facts in enumerate(nodes):
        if isinstance(facts.roce, Unknown):
            yield Finding("gid", Level.UNKNOWN, facts.node, f"the GIDs: {facts.roce.reason}")
            continue
        devices = {device.name: device for device in facts.roce}
        rows = {end.hca: _row(devices.get(end.hca), end) for end in plan.ends(rank)}
        told = ", ".join(f"{hca} row {row}" for hca, row in rows.items())
        absent = [end for end in plan.ends(rank) if rows[end.hca] is None]
        if any(not _has(facts.nic(end.interface), end) for end in absent):
            yield Finding("gid", Level.UNKNOWN, facts.node, "the link has no addresses yet, so no GIDs", "sparkctl up")
        elif absent:
            evidence = f"{absent[0].hca} has no RoCE v2 GID for {absent[0].address.ip}: RDMA finds no way"
            fix = f"on {facts.node}: sudo ip link set {absent[0].interface} down && sudo netplan apply"
            yield Finding("gid", Level.FAIL, facts.node, evidence, fix)
        elif forced is not None and any(str(row) != forced for row in rows.values()):
            evidence = f"`env` sets NCCL_IB_GID_INDEX={forced}, but the link's addresses are {told}"
            yield Finding(
                "gid", Level.FAIL, facts.node, evidence, "take NCCL_IB_GID_INDEX out of the inventory: NCCL finds it"
            )
        else:
            yield Finding("gid", Level.OK, facts.node, f"the link's addresses in RoCE v2: {told}")


def _row(device: RoceDevice | None, end: End) -> int | None:
    rows = [gid.index for gid in device.gids if gid.ipv4 == end.address.ip and gid.kind == "RoCE v2"] if device else []
    return rows[0] if rows else None


def _hca(case: Case, plan: LinkPlan, nodes: Both) -> Iterator[Finding]:
    said = case.inventory.env.get("NCCL_IB_HCA")
    if said is None:
        names = [",".join(end.hca for end in plan.ends(rank)) for rank in (0, 1)]
        yield Finding("hca", Level.OK, None, f"ranks get NCCL_IB_HCA={' and '.join(dict.fromkeys(names))}: both twins")
        return
    for rank, facts in enumerate(nodes):
        left_out = [end for end in plan.ends(rank) if not _chosen(said, end.hca)]
        if left_out:
            netdevs = [end.interface for end in plan.ends(rank) if end.interface in said]
            why = f": {netdevs[0]} is an interface, no RoCE device" if netdevs else ""
            evidence = f"`env` sets NCCL_IB_HCA={said}, which leaves out {', '.join(end.hca for end in left_out)}{why}"
            yield Finding(
                "hca", Level.FAIL, facts.node, evidence, "take NCCL_IB_HCA out of the inventory: ranks get both twins"
            )
        else:
            yield Finding("hca", Level.OK, facts.node, f"`env` sets NCCL_IB_HCA={said}: both twins")


def _chosen(setting: str, device: str) -> bool:
    """Whether NCCL takes a device: names are beginnings, `=` asks for whole names, `^` for all others; `:PORT` may follow."""
    found = re.fullmatch(r"(\^?)(=?)(.*)", setting)
    assert found is not None
    names = [name.partition(":")[0] for name in found[3].split(",") if name]
    named = device in names if found[2] else any(device.startswith(name) for name in names)
    return not named if found[1] else named


# Firewalls.


def _firewall(case: Case, plan: LinkPlan, nodes: Both) -> Iterator[Finding]:
    for rank, facts in enumerate(nodes):
        on = [
            name
            for name, runs in (("ufw", known(facts.ufw, None)), ("firewalld", _runs(facts, "firewalld.service")))
            if runs
        ]
        rules = facts.nft if isinstance(facts.nft, str) else ""
        closed = _DROPS.search(rules) is not None
        if not on and not closed:
            unseen = facts.ufw.reason if isinstance(facts.ufw, Unknown) else ""
            level = Level.UNKNOWN if unseen else Level.OK
            yield Finding("firewall", level, facts.node, unseen or "no firewall is on")
            continue
        name = on[0] if on else "a packet filter"
        blocked = [rail.subnet for rail in plan.rails if not _admitted(rules, rail.subnet, plan.ends(rank)[rail.index])]
        yield _filtered(case, facts.node, rank, name, rules=rules, blocked=blocked)


def _filtered(case: Case, node: str, rank: int, name: str, *, rules: str, blocked: list[IPv4Network]) -> Finding:
    """What a firewall that is on means for the link, by its rules if they can be seen, else by what has passed."""
    if rules and (not blocked or _DROPS.search(rules) is None):
        return Finding("firewall", Level.OK, node, f"{name} is on, and lets the link's subnets in")
    fix = " && ".join(_allowing(name, subnet) for subnet in blocked)
    if case.measurement and _heard(case.measurement, rank):
        return Finding("firewall", Level.OK, node, f"{name} is on, and streams came in on both rails")
    if rules:
        evidence = f"{name} is on, and no rule lets {' and '.join(map(str, blocked))} in"
        return Finding("firewall", Level.FAIL, node, evidence, f"on {node}: {fix}")
    evidence = f"{name} is on; only root sees whether it lets {' and '.join(map(str, blocked))} in"
    return Finding("firewall", Level.UNKNOWN, node, evidence, f"on {node}: {fix}")


def _allowing(name: str, subnet: IPv4Network) -> str:
    if name == "firewalld":
        return f"sudo firewall-cmd --permanent --zone=trusted --add-source={subnet} && sudo firewall-cmd --reload"
    if name == "ufw":
        return f"sudo ufw allow from {subnet}"
    return f"let {subnet} in; `sudo nft list ruleset` shows what does not"


def _runs(facts: Facts, unit: str) -> bool:
    found = facts.unit(unit)
    return found is not None and found.active == "active"


def _admitted(rules: str, subnet: IPv4Network, end: End) -> bool:
    """Whether a rule of `nft list ruleset` accepts a whole subnet, or all that comes in by the rail's interface."""
    for line in rules.splitlines():
        if not re.search(r"\baccept\b", line) or re.search(r"\b[tu]?(dport|sport|icmp)\b", line):
            continue
        if re.search(rf'iifname "{re.escape(end.interface)}"', line):
            return True
        source = re.search(r"ip saddr (\d+\.\d+\.\d+\.\d+(?:/\d+)?)", line)
        if source and _covers(source[1], subnet):
            return True
    return False


def _covers(text: str, subnet: IPv4Network) -> bool:
    try:
        return subnet.subnet_of(IPv4Network(text, strict=False))
    except ValueError:
        return False


def _heard(measurement: Measurement, rank: int) -> bool:
    """Whether streams came in at a node on both rails."""
    runs = [run for run in measurement.both("tcp") if run.sender == 1 - rank]
    return any(all(flow.received for flow in run.flows) for run in runs)


# What was measured.


def _measured(case: Case) -> Iterable[Finding]:
    taken, plan = case.measurement, case.plan
    if taken is None:
        why = "the link has not been measured"
    elif isinstance(plan, LinkPlan) and not taken.is_of(plan):
        why = "the last measurement is of another configuration of the link"
    else:
        return bandwidth.judge(taken, case.inventory.link)
    return [Finding("bandwidth", Level.UNKNOWN, None, why, "sparkctl bench link")]


MEASURED = ("bandwidth", "path", "mtu", "route", "message", "asymmetry", "collective")

CHECKS = (
    Check(("cable", "port"), _cable),
    _planned("twin", _carriers),
    _planned("speed", _speeds),
    _planned("rdma", _devices),
    of_the_link("pcie", _pcie),
    _planned("subnet", _subnets),
    of_the_link("address", _addresses),
    of_the_link("mtu", _mtu),
    of_the_link("gid", _gid),
    of_the_link("hca", _hca),
    of_the_link("firewall", _firewall),
    Check(MEASURED, _measured),
)
