"""Sparks found on the network: what announces an SSH server by mDNS, of that what a person has chosen, of that what has a GB10.

mDNS can be spoofed. So a name is only listed until somebody chooses it, and then reached as any node is: its host key checked, by
our own key, never with a password or a forwarded agent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from cluster import survey
from cluster.errors import FailedError, RefusedError, WrongInputError
from cluster.facts import Facts
from cluster.inventory import Node
from cluster.readings.mdns import Announced, avahi_browse
from cluster.transport import Transport
from cluster.transport.hostkeys import UnknownHostKeyError

_BROWSE = ("avahi-browse", "-p", "-r", "-f", "-t", "_ssh._tcp")  # as NVIDIA's discover script asks


@dataclass(frozen=True)
class Spark:
    """A node that turned out to be a DGX Spark."""

    node: Node
    facts: Facts


def announced(here: Transport) -> tuple[Announced, ...]:
    """What announces itself to `here`; one line of each host and address.

    Raises:
        FailedError: avahi-browse is not there, or there is nobody to ask.
    """
    result = here.run(_BROWSE, timeout=20.0)
    if result.status:
        said = result.stderr.decode(errors="replace").strip().splitlines()
        raise FailedError(
            f"avahi-browse: {said[-1][:200] if said else f'exit status {result.status}'}",
            "sudo apt install avahi-daemon avahi-utils; or write the inventory by hand",
        )
    found = avahi_browse(result.stdout.decode(errors="replace"))
    return tuple({(one.host, one.address, one.port): one for one in found}.values())


def node_of(one: Announced, user: str | None) -> Node:
    """How the inventory would name and reach it.

    Raises:
        WrongInputError: `user` cannot be a user's name.
    """
    name = one.host.partition(".")[0][:63]
    try:
        return Node(name=name, host=str(one.address), user=user, port=one.port)
    except ValidationError as error:
        raise WrongInputError(f"{name}: {error.errors()[0]['msg']}", "give another one") from None


def sparks(
    nodes: Sequence[Node], transports: Sequence[Transport], accept: Callable[[UnknownHostKeyError], bool]
) -> tuple[Spark, ...]:
    """Log in to the chosen nodes and look at them.

    Raises:
        RefusedError: one is no DGX Spark, or its host key was not accepted.
        FailedError: one cannot be reached.
    """
    survey.meet(transports, accept)
    seen = survey.each(zip(transports, nodes, strict=True), lambda pair: survey.facts_of(*pair))
    for node, facts in zip(nodes, seen, strict=True):
        if facts.is_spark is not True:
            raise RefusedError(f"{node.name} ({node.host}) has no GB10: it is no DGX Spark", "choose another one")
    return tuple(Spark(node, facts) for node, facts in zip(nodes, seen, strict=True))


def inventory_text(found: Sequence[Spark]) -> str:
    """The inventory of these nodes, the first the head. JSON's strings are YAML's too."""
    lines = []
    for spark in found:
        node = spark.node
        keys = {"name": node.name, "host": node.host, "user": node.user, "port": node.port if node.port != 22 else None}
        said = ", ".join(f"{key}: {json.dumps(value)}" for key, value in keys.items() if value is not None)
        lines.append(f"  - {{{said}}}\n")
    return "# Written by `sparkctl up --discover`; rank 0 first.\nnodes:\n" + "".join(lines)
