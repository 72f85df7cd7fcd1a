"""Where the cable is: the QSFP sockets of both nodes, their twin interfaces, and what is off with them. Pure.

A QSFP socket (port 0 or 1) is two interfaces, its twins, because a Spark's ConnectX-7 hangs on two PCIe links of 100 Gb/s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.errors import RefusedError
from cluster.facts import Facts, Nic, RoceDevice, Unknown, known
from cluster.finding import Finding, Level

FULL_SPEED = 200_000  # Mb/s that each twin shows with a good cable: both share the socket's
_CABLES = (
    "use a cable that NVIDIA names (Amphenol NJAAKK-N911, NJAAKK0006; Luxshare LMTQF022-SD-R), and no slower switch"
)
_COLD_START = "reseat the cable; if that is not it, power both boxes off and unplug them for a minute"


@dataclass(frozen=True)
class Twin:
    """One of the two interfaces of a QSFP socket, with its RoCE device."""

    nic: Nic
    device: RoceDevice


@dataclass(frozen=True)
class Side:
    """A node, the socket that the cable is in, and its twins in the order of their PCIe links."""

    facts: Facts
    port: int
    twins: tuple[Twin, Twin]

    @property
    def node(self) -> str:
        """The node's name."""
        return self.facts.node

    @property
    def interfaces(self) -> tuple[str, str]:
        """The names of the twins."""
        return self.twins[0].nic.name, self.twins[1].nic.name


Pair = tuple[Side, Side]


def sockets(facts: Facts) -> dict[int, tuple[Twin, ...]]:
    """The QSFP sockets of a node: port 0 or 1 to its twins, in the order of their PCIe links.

    A function's PCI address tells both: the function is the socket, the domain the PCIe link. Where there is no PCI address,
    the names do: `enp1s0f0np0` and `enP2p1s0f0np0` are port 0.
    """
    found: dict[int, list[tuple[int, Twin]]] = {}
    for device in known(facts.roce, ()):
        nic = facts.nic(device.interface) if device.interface else None
        place = _place(device)
        if nic and place and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}", nic.name):  # it goes into files and argv
            found.setdefault(place[0], []).append((place[1], Twin(nic, device)))
    return {port: tuple(twin for _, twin in sorted(found[port], key=lambda one: one[0])) for port in sorted(found)}


def _place(device: RoceDevice) -> tuple[int, int] | None:
    if device.pci:
        return device.pci.function, device.pci.domain
    named = re.fullmatch(r"en(?:P(\d{1,4}))?p\d+s\d+f(\d)(?:np\d)?", device.interface or "")
    return (int(named[2]), int(named[1] or 0)) if named else None


def candidates(head: Facts, peer: Facts, wish: int | str) -> list[Pair]:
    """The pairs of sockets that a cable joins, the first the one to take: several only where several have a carrier at both.

    Args:
        wish: the port that the inventory names, or `auto`.

    Raises:
        RefusedError: there is no cable, or not where the inventory says; or a socket lacks an interface.
    """
    for facts in (head, peer):
        if not sockets(facts):
            reason = f": {facts.roce.reason}" if isinstance(facts.roce, Unknown) else ""
            raise RefusedError(
                f"{facts.node}: no ConnectX-7 interface with a RoCE device is seen{reason}",
                f"look at `ibdev2netdev` on {facts.node}; the driver is mlx5_ib",
            )
    if isinstance(wish, int):
        ports = [(wish, wish)]
        _check_named(head, peer, wish)
    else:
        lit = [_lit(facts) for facts in (head, peer)]
        ports = [(port, port) for port in sorted(lit[0] & lit[1])]
        if not ports and lit[0] and lit[1]:
            ports = [(min(lit[0]), min(lit[1]))]
        if not ports:
            raise _no_cable(head, peer)
    return [(_side(head, at_head), _side(peer, at_peer)) for at_head, at_peer in ports]


def _lit(facts: Facts) -> set[int]:
    return {port for port, twins in sockets(facts).items() if any(twin.nic.carrier for twin in twins)}


def _is_off(twins: Iterable[Twin]) -> bool:
    """Whether an interface is set down, so that neither end of a cable sees a carrier."""
    return any(not twin.nic.up for twin in twins)


def _seen(head: Facts, peer: Facts) -> str:
    return "; ".join(f"{facts.node}: {', '.join(_states(facts))}" for facts in (head, peer))


def _states(facts: Facts) -> Iterator[str]:
    for port, twins in sockets(facts).items():
        lit = any(twin.nic.carrier for twin in twins)
        yield f"port {port} {'has a carrier' if lit else 'is set down' if _is_off(twins) else 'has no carrier'}"


def _check_named(head: Facts, peer: Facts, port: int) -> None:
    missing = [facts.node for facts in (head, peer) if port not in sockets(facts)]
    if missing:
        raise RefusedError(
            f"{' and '.join(missing)} have no port {port} ({_seen(head, peer)})", "correct `link.port` in the inventory"
        )
    dark = not all(port in _lit(facts) for facts in (head, peer))
    if dark and not any(_is_off(sockets(facts)[port]) for facts in (head, peer)):
        raise RefusedError(
            f"port {port} has no cable between {head.node} and {peer.node} ({_seen(head, peer)})",
            f"put the cable into port {port} of both boxes, or correct `link.port` in the inventory",
        )


def _no_cable(head: Facts, peer: Facts) -> RefusedError:
    off = [facts.node for facts in (head, peer) if any(_is_off(twins) for twins in sockets(facts).values())]
    fix = "put the cable into the same socket of both boxes, push until it clicks, and look at `ibdev2netdev`"
    if off:
        fix = f"interfaces of {' and '.join(off)} are set down: name the socket with `link.port`, and `up` brings it up"
    return RefusedError(f"no cable between {head.node} and {peer.node} ({_seen(head, peer)})", fix)


def _side(facts: Facts, port: int) -> Side:
    twins = sockets(facts)[port]
    if len(twins) != 2:
        names = ", ".join(twin.nic.name for twin in twins)
        raise RefusedError(f"{facts.node}: port {port} has {len(twins)} interface(s) ({names}), not two", _COLD_START)
    return Side(facts, port, (twins[0], twins[1]))


def findings(pair: Pair) -> list[Finding]:
    """What is off with the cable, its sockets and their interfaces."""
    head, peer = (side.facts for side in pair)
    found = []
    if len(_lit(head) & _lit(peer)) > 1:
        found.append(
            Finding(
                "cable",
                Level.WARN,
                None,
                f"both sockets have a cable; the link takes port {pair[0].port} ({_seen(head, peer)})",
                "take one out: one carries all that the PCIe links give, two halve it unless all four interfaces are used",
            )
        )
    if pair[0].port != pair[1].port:
        where = " and ".join(f"port {side.port} of {side.node}" for side in pair)
        fix = "NVIDIA asks for the same socket on both boxes: move one end"
        found.append(Finding("port", Level.WARN, None, f"the cable is in {where}", fix))
    for side in pair:
        for twin, other in (side.twins, side.twins[::-1]):
            found += _twin_findings(side, twin, other)
    return found


def _twin_findings(side: Side, twin: Twin, other: Twin) -> Iterator[Finding]:
    nic, device, node = twin.nic, twin.device, side.node
    if not nic.up:
        yield Finding("twin", Level.WARN, node, f"{nic.name} is set down", "`sparkctl up` brings it up")
    elif not nic.carrier and other.nic.carrier:
        evidence = f"{nic.name} has no carrier, though its twin {other.nic.name} has one: half speed"
        yield Finding("twin", Level.FAIL, node, evidence, _COLD_START)
    if nic.carrier and device.state != "ACTIVE":
        evidence = f"{device.name} ({nic.name}) is {device.state or 'in no known state'}, not ACTIVE"
        yield Finding("rdma", Level.FAIL, node, evidence, _COLD_START)
    speed = known(nic.ethtool_speed, None) or nic.speed
    if nic.carrier and speed is not None and speed < FULL_SPEED:
        yield Finding("speed", Level.WARN, node, f"{nic.name} runs at {speed}Mb/s, not {FULL_SPEED}", _CABLES)
    said = {name: interface for name, interface, _ in known(side.facts.ibdev2netdev, ())}.get(device.name)
    if said not in (None, nic.name):
        evidence = f"{device.name} is {nic.name}'s by /sys, but {said}'s by ibdev2netdev"
        yield Finding("rdma", Level.WARN, node, evidence, f"reboot {node}")
