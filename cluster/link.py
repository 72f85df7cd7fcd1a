"""The link between two nodes, planned from their facts: two rails, or the reason why there can be none. Pure.

Each twin interface of the cabled socket, with its counterpart on the other node, is a rail on a subnet of its own: on one
subnet for both, which of them traffic takes would be chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network

from cluster import cable, subnets
from cluster.cable import Pair, Side
from cluster.errors import RefusedError
from cluster.facts import Facts, Nic, Unknown, known
from cluster.finding import Finding, Level
from cluster.inventory import Link


@dataclass(frozen=True)
class End:
    """One end of a rail. `hca` is the name of the interface's RoCE device."""

    node: str
    interface: str
    address: IPv4Interface
    hca: str


@dataclass(frozen=True)
class Rail:
    """A twin of the head and its counterpart on the peer, on a subnet of their own. `mtu` in bytes."""

    index: int
    subnet: IPv4Network
    head: End
    peer: End
    mtu: int

    @property
    def ends(self) -> tuple[End, End]:
        """Both ends, by rank."""
        return self.head, self.peer


@dataclass(frozen=True)
class LinkPlan:
    """The rails; whether the nodes are configured for them already (`adopted`: nothing is to be written); what is off."""

    rails: tuple[Rail, Rail]
    adopted: bool
    findings: tuple[Finding, ...]

    def ends(self, rank: int) -> tuple[End, End]:
        """The ends at the node of that rank, by rail."""
        return self.rails[0].ends[rank], self.rails[1].ends[rank]


def plan(head: Facts, peer: Facts, wish: Link) -> LinkPlan:
    """Plan the link of a pair.

    The configuration that the nodes have is adopted where it lasts, gives both twins addresses that meet, and goes against
    nothing that the inventory says in so many words. Otherwise the rails get the inventory's subnets, or the next free ones
    where something else has those, with the head at .10 and the peer at .11. Planning again after that changes nothing.

    Raises:
        RefusedError: there is no cable to plan for, it is not in the socket that the inventory names, or no subnet is free.
    """
    _refuse_one_machine(head, peer)
    pairs = cable.candidates(head, peer, wish.port)
    for pair in pairs:
        existing = _existing(pair)
        if existing and not any(_contradictions(pair, existing, wish)):
            return _adopted(pair, existing, wish)
    pair = pairs[0]
    existing = _existing(pair)
    rails, notes = _fresh(pair, wish)
    if rails == existing and not _uneven(pair, existing):
        return _adopted(pair, existing, wish)
    notes += _configuration(pair, existing, wish)
    return LinkPlan(rails, adopted=False, findings=(*notes, *cable.findings(pair)))


def _refuse_one_machine(head: Facts, peer: Facts) -> None:
    # Both, because a copied disk has the same machine-id, and containers of one machine the same boot-id.
    identities = [(facts.machine_id, facts.boot_id) for facts in (head, peer)]
    if identities[0] == identities[1] and all(isinstance(part, str) for part in identities[0]):
        raise RefusedError(
            f"{head.node} and {peer.node} are the same machine", "correct `host` of one of them in the inventory"
        )


# What the nodes are configured for.


def _existing(pair: Pair) -> tuple[Rail, Rail] | None:
    """The rails that the nodes' lasting configuration makes, with the MTU of the head's interfaces; None: it makes none."""
    for order in ((0, 1), (1, 0)):  # which twin of the peer is on the subnet of the head's first
        first, second = (_meeting(pair, index, order[index]) for index in (0, 1))
        if first and second and not first.subnet.overlaps(second.subnet):
            return None if any(subnets.takers(pair, rail.subnet) for rail in (first, second)) else (first, second)
    return None


def _meeting(pair: Pair, ours: int, theirs: int) -> Rail | None:
    """The rail on which a twin of the head and one of the peer meet."""
    nic = pair[0].twins[ours].nic
    both = (
        (a, b) for a in _kept(nic) for b in _kept(pair[1].twins[theirs].nic) if a.network == b.network and a.ip != b.ip
    )
    met = next(both, None)
    return _rail(pair, ours, met, nic.mtu or 0, theirs) if met else None


def _rail(pair: Pair, index: int, addresses: tuple[IPv4Interface, IPv4Interface], mtu: int, theirs: int) -> Rail:
    twins = pair[0].twins[index], pair[1].twins[theirs]
    head, peer = (
        End(side.node, twin.nic.name, address, twin.device.name)
        for side, twin, address in zip(pair, twins, addresses, strict=True)
    )
    return Rail(index, addresses[0].network, head, peer, mtu)


def _kept(nic: Nic) -> list[IPv4Interface]:
    """The addresses that an interface keeps over a reboot, and that a rail can use."""
    profiles = known(nic.profiles, ())
    counting = [profile for profile in profiles if profile.active] or (list(profiles) if len(profiles) == 1 else [])
    return [address for profile in counting for address in profile.addresses if _is_usable(address)]


def _is_usable(address: IPv4Interface) -> bool:
    network = address.network
    edges = (network.network_address, network.broadcast_address)
    return not address.is_link_local and network.prefixlen <= 30 and address.ip not in edges


def _nics(pair: Pair, rail: Rail) -> tuple[Nic, Nic]:
    """The interfaces of a rail, by rank."""
    twins = [{twin.nic.name: twin.nic for twin in side.twins} for side in pair]
    return twins[0][rail.head.interface], twins[1][rail.peer.interface]


def _uneven(pair: Pair, rails: tuple[Rail, Rail]) -> list[str]:
    """Rails with one MTU at one end and another at the other: big messages hang, and only those."""
    mtus = [(rail.subnet, [nic.mtu or 0 for nic in _nics(pair, rail)]) for rail in rails]
    return [f"the MTU is {a} at one end of {subnet} and {b} at the other" for subnet, (a, b) in mtus if a != b]


def _contradictions(pair: Pair, rails: tuple[Rail, Rail], wish: Link) -> Iterator[str]:
    """What speaks against leaving a sound configuration alone."""
    said = wish.model_fields_set
    yield from _uneven(pair, rails)
    if "subnets" in said and {rail.subnet for rail in rails} != set(wish.subnets):
        yield f"the inventory asks for {wish.subnets[0]} and {wish.subnets[1]}"
    if "mtu" in said and any(rail.mtu != wish.mtu for rail in rails):
        yield f"the inventory asks for an MTU of {wish.mtu}"


def _adopted(pair: Pair, rails: tuple[Rail, Rail], wish: Link) -> LinkPlan:
    notes = []
    if any(rail.mtu != wish.mtu for rail in rails):
        evidence = f"the nodes are configured for an MTU of {rails[0].mtu} and {rails[1].mtu}; {wish.mtu} is faster"
        fix = f"write `mtu: {wish.mtu}` under `link` in the inventory, and `sparkctl up` sets it"
        notes.append(Finding("mtu", Level.WARN, None, evidence, fix))
    for rail in rails:
        for end, nic in zip(rail.ends, _nics(pair, rail), strict=True):
            if end.address not in nic.ipv4:
                evidence = f"{end.interface} is configured for {end.address} but does not have it"
                notes.append(Finding("address", Level.WARN, end.node, evidence, "sudo netplan apply"))
    return LinkPlan(rails, adopted=True, findings=(*notes, *cable.findings(pair)))


# New addresses.


def _fresh(pair: Pair, wish: Link) -> tuple[tuple[Rail, Rail], list[Finding]]:
    """The rails as the inventory wishes them, and what had to be otherwise."""
    notes = [
        Finding("subnet", Level.UNKNOWN, side.node, f"which subnets are taken: {side.facts.routes.reason}")
        for side in pair
        if isinstance(side.facts.routes, Unknown)
    ]
    choices = subnets.choose(pair, wish.subnets)
    rails = []
    for index, (wanted, choice) in enumerate(zip(wish.subnets, choices, strict=True)):
        if choice.takers:
            evidence = f"{wanted} is taken ({'; '.join(choice.takers)}): rail {index} gets {choice.subnet}"
            notes.append(Finding("subnet", Level.OK, None, evidence))
        first, second = subnets.addresses(pair, choice.subnet)
        length = choice.subnet.prefixlen
        both = IPv4Interface(f"{first}/{length}"), IPv4Interface(f"{second}/{length}")
        rails.append(_rail(pair, index, both, wish.mtu, index))
    return (rails[0], rails[1]), notes


def _configuration(pair: Pair, existing: tuple[Rail, Rail] | None, wish: Link) -> Iterator[Finding]:
    """Why the configuration that is there was not adopted."""
    if existing:
        for reason in _contradictions(pair, existing, wish):
            evidence = f"the nodes' own configuration of the link is replaced: {reason}"
            yield Finding("adoption", Level.OK, None, evidence)
        return
    for side in pair:
        yield from _one_subnet(side)
        for twin in side.twins:
            yield from _lasting(side, twin.nic)


def _one_subnet(side: Side) -> Iterator[Finding]:
    first, second = (twin.nic for twin in side.twins)
    networks = [{address.network for address in nic.ipv4 if _is_usable(address)} for nic in (first, second)]
    for network in sorted(networks[0] & networks[1]):
        evidence = f"{first.name} and {second.name} are both on {network}: which of them traffic takes is chance"
        yield Finding("subnet", Level.WARN, side.node, evidence, "`sparkctl up` gives each a subnet of its own")


def _lasting(side: Side, nic: Nic) -> Iterator[Finding]:
    if isinstance(nic.profiles, Unknown):
        evidence = f"what {nic.name} keeps over a reboot: {nic.profiles.reason}"
        yield Finding("address", Level.UNKNOWN, side.node, evidence)
        return
    lost = [str(address) for address in nic.ipv4 if _is_usable(address) and address not in _kept(nic)]
    if lost:
        evidence = f"{', '.join(lost)} of {nic.name} is in no configuration: the next reboot or DHCP takes it away"
        yield Finding("address", Level.WARN, side.node, evidence, "`sparkctl up` writes what lasts")
