"""Which subnets and addresses the rails can have: what the nodes have elsewhere is taken. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from cluster.cable import Pair, Side
from cluster.errors import RefusedError
from cluster.facts import known

_FIRST_HOST = 10  # NVIDIA's playbook: node 1 is .10, node 2 .11
_PRIVATE = [IPv4Network(block) for block in ("192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8")]  # RFC 1918


@dataclass(frozen=True)
class Choice:
    """The subnet of a rail; `takers` say why it is not the one that was wished for."""

    subnet: IPv4Network
    takers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Taken:
    """A network that a node has elsewhere than on the link, and in words where."""

    network: IPv4Network
    by: str


def choose(pair: Pair, wanted: tuple[IPv4Network, IPv4Network]) -> tuple[Choice, Choice]:
    """A subnet for each rail: the one wanted, or the next of its size on which neither node has anything.

    Raises:
        RefusedError: every private subnet is taken.
    """
    taken = _taken(pair)
    first = _free(pair, taken, wanted[0], avoid=wanted[1])
    return first, _free(pair, taken, wanted[1], avoid=first.subnet)


def takers(pair: Pair, subnet: IPv4Network) -> tuple[str, ...]:
    """What the nodes have on a subnet elsewhere than on the link: `spark-a: docker0 has 192.168.100.1/24`."""
    return tuple(one.by for one in _taken(pair) if one.network.overlaps(subnet))


def _free(pair: Pair, taken: list[Taken], wanted: IPv4Network, avoid: IPv4Network) -> Choice:
    found = tuple(one.by for one in taken if one.network.overlaps(wanted))
    if not found:
        return Choice(wanted)
    networks = [avoid, *(one.network for one in taken)]
    for subnet in _following(wanted):
        if not any(network.overlaps(subnet) for network in networks):
            return Choice(subnet, found)
    raise RefusedError(
        f"{pair[0].node} and {pair[1].node} have no subnet free for a rail: {wanted} is taken ({'; '.join(found)})",
        "name two free ones under `link.subnets` in the inventory",
    )


def _taken(pair: Pair) -> list[Taken]:
    """Each network once for a node: the route to an address's own network says nothing new."""
    found: dict[tuple[str, IPv4Network], Taken] = {}
    for side in pair:
        for one in _elsewhere(side):
            found.setdefault((side.node, one.network), one)
    return list(found.values())


def _elsewhere(side: Side) -> Iterator[Taken]:
    for nic in known(side.facts.nics, ()):
        if nic.name not in side.interfaces:
            yield from (Taken(address.network, f"{side.node}: {nic.name} has {address}") for address in nic.ipv4)
    for route in known(side.facts.routes, ()):
        # A VPN's route to half the world takes nothing: any local subnet goes before it.
        if route.interface not in side.interfaces and route.network.prefixlen >= 8:
            yield Taken(route.network, f"{side.node}: a route to {route.network} by {route.interface}")


def _following(wanted: IPv4Network) -> Iterator[IPv4Network]:
    """Private networks of the same size: those after it in its own block, then those of the other blocks."""
    own = [block for block in _PRIVATE if wanted.subnet_of(block)]
    for block in sorted(_PRIVATE, key=lambda block: block not in own):
        if block.prefixlen <= wanted.prefixlen:
            networks = block.subnets(new_prefix=wanted.prefixlen)
            yield from (network for network in networks if block not in own or network > wanted)


def addresses(pair: Pair, subnet: IPv4Network) -> tuple[IPv4Address, IPv4Address]:
    """The head's and the peer's address on a rail's subnet: .10 and .11, or the next that no third machine has.

    Raises:
        RefusedError: it has no two left.
    """
    taken = _strangers(pair, subnet)
    free = (number for number in _numbers(subnet) if number not in taken)
    head, peer = next(free, None), next(free, None)
    if head is None or peer is None:
        raise RefusedError(
            f"{subnet} has no two addresses left for {pair[0].node} and {pair[1].node}",
            "name a larger one under `link.subnets` in the inventory",
        )
    return head, peer


def _strangers(pair: Pair, subnet: IPv4Network) -> set[IPv4Address]:
    """Addresses with which a third machine was heard on the link: there may be a switch."""
    ours = {nic.mac for side in pair for nic in known(side.facts.nics, ())}
    return {
        neighbour.address
        for side in pair
        for neighbour in known(side.facts.neighbours, ())
        if neighbour.address in subnet and neighbour.interface in side.interfaces and neighbour.mac not in ours
    }


def _numbers(subnet: IPv4Network) -> Iterable[IPv4Address]:
    first, last = int(subnet.network_address) + 1, int(subnet.broadcast_address) - 1
    start = first + _FIRST_HOST - 1
    return map(IPv4Address, [*range(start, min(start + 200, last + 1)), *range(first, min(start, last + 1))])
