"""How the ranks and agents of a job reach each other: the environment of each rank, both ends of the rails, the second path."""

from __future__ import annotations

import os
import secrets
import socket

from cluster import environ
from cluster.inventory import Inventory
from cluster.record import PairRecord
from launch.spec import EndSpec, LinkSpec

# UDP ports of agents: below those that kernels give out by themselves (32768 on).
PORTS = range(20000, 30000)
# What each attempt has its own of.
_PER_ATTEMPT = ("MASTER_ADDR", "MASTER_PORT")


def link(inventory: Inventory, record: PairRecord | None) -> LinkSpec | None:
    """The link of a job over both nodes; None for the embedded pair."""
    if record is None:
        return None
    return LinkSpec(
        rails=tuple(
            tuple(EndSpec(interface=end.interface, address=str(end.address.ip)) for end in rail.ends)
            for rail in record.rails
        ),
        management=management(inventory),
        port=secrets.choice(PORTS),
    )


def management(inventory: Inventory) -> tuple[str, str]:
    """Both nodes' addresses on the management network, as this machine sees them; empty where it cannot tell.

    What an agent makes of an address that is not its own, behind a router say, is to do without the second path.
    """
    hosts = [node.host for node in inventory.nodes]
    head, peer = (_address(host) if host is not None else "" for host in hosts)
    if hosts[0] is None:
        head = _ours(peer)
    if hosts[1] is None:
        peer = _ours(head)
    return head, peer


def _address(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_DGRAM)[0][4][0])
    except OSError:  # a name that only ssh's configuration knows, or IPv6 alone
        return ""


def _ours(other: str) -> str:
    """This machine's address towards another; nothing is sent."""
    if not other:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def environment(
    inventory: Inventory, record: PairRecord | None, rank: int, node: str, world_size: int
) -> dict[str, str]:
    """What a rank of a job finds in its environment, but for the rendezvous."""
    if record is None:
        rendered = environ.embedded(
            rank=rank,
            world_size=world_size,
            cores=os.cpu_count() or 1,
            interfaces=tuple(name for _, name in socket.if_nameindex()),
            port=0,
        )
    else:
        side = [known.name for known in record.nodes].index(node)
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"} if world_size == 1 else {}
        rendered = environ.as_mapping(record.environment[side]) | alone
    return {name: value for name, value in rendered.items() if name not in _PER_ATTEMPT}
