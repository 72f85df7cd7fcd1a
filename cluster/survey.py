"""Both nodes looked at, at once: facts, keys, what a died run has left, and the plan of the link between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cluster import facts as fact
from cluster import link, netplan, probe, transaction
from cluster.changes import Run
from cluster.errors import FailedError, SparkctlError
from cluster.facts import Facts, known
from cluster.inventory import Inventory, Node
from cluster.link import LinkPlan
from cluster.transaction import Host
from cluster.transport import Transport
from cluster.transport.hostkeys import KnownHosts, UnknownHostKeyError
from cluster.wishes import KEY, Site, Sites, public_key

T = TypeVar("T")
R = TypeVar("R")

PROBE_SECONDS = 30.0
_HOST_KEYS = ("sh", "-c", "cat /etc/ssh/ssh_host_*_key.pub")  # its words are ours alone


@dataclass(frozen=True)
class Unfinished:
    """A run that died on a node and left something half made."""

    node: str
    run: Run


@dataclass(frozen=True)
class Survey:
    """A pair as it was found."""

    sites: Sites
    plan: LinkPlan


def meet(transports: Sequence[Transport], accept: Callable[[UnknownHostKeyError], bool]) -> None:
    """Connect to both; an unknown host key is saved in known_hosts if `accept` agrees.

    Raises:
        UnknownHostKeyError, ChangedHostKeyError: not accepted; nothing was run on that node.
        FailedError: a node cannot be reached.
    """
    for outcome in each(transports, _greeting):
        if isinstance(outcome, UnknownHostKeyError):
            if not accept(outcome):
                raise outcome
            KnownHosts().accept(outcome.key)
        elif outcome is not None:
            raise outcome
    for outcome in each(transports, _greeting):  # what was accepted is what answers
        if outcome is not None:
            raise outcome


def _greeting(transport: Transport) -> SparkctlError | None:
    try:
        transport.home()
    except SparkctlError as error:
        return error
    return None


def unfinished(hosts: Sequence[Host]) -> tuple[Unfinished, ...]:
    """The runs that died on the nodes; or that go on there, as whoever asks for the locks will learn."""
    books = each(hosts, lambda host: transaction.look(host, ()).books)
    return tuple(
        Unfinished(host.name, one.unfinished) for host, one in zip(hosts, books, strict=True) if one.unfinished
    )


def facts_of(transport: Transport, node: Node) -> Facts:
    """Probe one node: one round trip.

    Raises:
        FailedError: it cannot be reached, or its answer makes no sense.
    """
    result = transport.run(probe.ARGV, stdin=probe.script(python_path=node.python), timeout=PROBE_SECONDS)
    if result.status:
        said = result.stderr.decode(errors="replace").strip().splitlines()
        raise FailedError(
            f"{node.name}: its Python does not run the probe: {said[-1][:200] if said else f'status {result.status}'}",
            f"log in there and try `{probe.ARGV[0]} --version`",
        )
    return fact.parse(result.stdout, node.name)


def survey(inventory: Inventory, hosts: Sequence[Host]) -> Survey:
    """Look at both nodes, and plan their link.

    Raises:
        RefusedError: there can be no link.
        FailedError: a node cannot be looked at.
    """
    found = each(
        zip(hosts, inventory.nodes, strict=True),
        lambda pair: (facts_of(pair[0].transport, pair[1]), _host_keys(pair[0])),
    )
    plan = link.plan(found[0][0], found[1][0], inventory.link)

    def site(rank: int) -> Site:
        facts, host_keys = found[rank]
        # Root is asked for the texts only where something is to be written beside them.
        complete = facts if plan.adopted else _with_netplan(hosts[rank], facts)
        home = known(facts.sparkctl, None)
        key = own_key(hosts[rank].transport, f"{home.path}/{KEY}.pub") if home and home.mode is not None else None
        return Site(inventory.nodes[rank], complete, host_keys, key)

    head, peer = each((0, 1), site)
    return Survey((head, peer), plan)


def _host_keys(host: Host) -> tuple[str, ...]:
    shown = host.transport.run(_HOST_KEYS, timeout=15.0).stdout.decode(errors="replace")
    return tuple(key for key in map(public_key, shown.splitlines()) if key)


def own_key(transport: Transport, path: str) -> str | None:
    """The public key in a file of the node's; None: there is none."""
    shown = transport.run(["cat", "--", path], timeout=15.0)
    return public_key(shown.stdout.decode(errors="replace")) if shown.status == 0 else None


def _with_netplan(host: Host, facts: Facts) -> Facts:
    texts = {}
    for path in netplan.unreadable(facts):
        shown = host.transport.run(["cat", "--", path], timeout=15.0, sudo=host.sudo)
        if shown.status == 0:
            texts[path] = shown.stdout.decode(errors="replace")
    return fact.with_netplan(facts, texts)


def each(items: Iterable[T], act: Callable[[T], R]) -> list[R]:
    """Do it for both nodes at once; raises what the first of them raised, when both have ended."""
    listed = list(items)
    with ThreadPoolExecutor(max(1, len(listed))) as pool:
        return [future.result() for future in [pool.submit(act, item) for item in listed]]
