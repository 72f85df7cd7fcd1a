"""Whether a pair works: its addresses are there, full-size packets pass on each rail, the ranks' Python runs our code."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.errors import FailedError
from cluster.link import LinkPlan, Rail
from cluster.transport import Transport

ADDRESSES_WITHIN = 15.0  # seconds: netplan returns before an address is there, NetworkManager takes some more
_POLL = 0.2
_PINGS = 3
_IP_AND_ICMP = 28  # bytes of headers in a packet of the size of the MTU


def addresses(transports: Sequence[Transport], plan: LinkPlan, *, within: float = ADDRESSES_WITHIN) -> None:
    """Wait until each interface of the link has its address and MTU.

    Raises:
        FailedError: one has not by then.
    """
    deadline = time.monotonic() + within

    def wait(rank: int) -> None:
        transport = transports[rank]
        while missing := _missing(transport, plan, rank):
            if time.monotonic() > deadline:
                raise FailedError(
                    f"{transport.name}: {missing} after {within:g} s", "look at `nmcli device` or `networkctl` there"
                )
            time.sleep(_POLL)

    _both(wait)


def _missing(transport: Transport, plan: LinkPlan, rank: int) -> str:
    """What is not as planned, in words; empty if all is."""
    shown = transport.run(["ip", "-j", "addr", "show"], timeout=10.0).stdout
    try:
        links = {link["ifname"]: link for link in json.loads(shown)}
        for rail, end in zip(plan.rails, plan.ends(rank), strict=True):
            link = links.get(end.interface, {})
            has = [f"{one.get('local')}/{one.get('prefixlen')}" for one in link.get("addr_info", ())]
            if str(end.address) not in has:
                return f"{end.interface} does not have {end.address}"
            if link.get("mtu") != rail.mtu:
                return f"{end.interface} has an MTU of {link.get('mtu')}, not {rail.mtu}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return "`ip -j addr` makes no sense"
    return ""


def pings(head: Transport, plan: LinkPlan) -> None:
    """Send packets of the size of the MTU, not to be fragmented, over each rail; their answers are as large.

    Raises:
        FailedError: none of a rail's came back.
    """

    def ping(index: int) -> None:
        rail = plan.rails[index]
        if head.run(ping_argv(rail), timeout=15.0).status:
            small = head.run(ping_argv(rail, size=56), timeout=15.0).status == 0
            raise _lost(rail, small)

    _both(ping)


def ping_argv(rail: Rail, *, size: int | None = None) -> list[str]:
    """The command; `size` bytes of payload, else as many as fill the MTU."""
    payload = str(rail.mtu - _IP_AND_ICMP if size is None else size)
    count = ["-c", str(_PINGS), "-i", "0.05", "-w", "5"]  # ends with the last answer; after 5 s whatever came
    return ["ping", "-n", "-q", "-M", "do", "-s", payload, *count, "-I", rail.head.interface, str(rail.peer.address.ip)]


def _lost(rail: Rail, small: bool) -> FailedError:
    where = f"{rail.head.node} {rail.head.interface} to {rail.peer.node} {rail.peer.interface} ({rail.subnet})"
    if small:
        return FailedError(
            f"{where}: packets of {rail.mtu} bytes are lost and small ones pass",
            f"something on the way has a smaller MTU: set it to {rail.mtu}, or `link.mtu` in the inventory to 1500",
        )
    return FailedError(
        f"{where}: no answer to a ping",
        f"is a firewall on? `sudo ufw allow from {rail.subnet}` on both nodes; else look at the cable",
    )


def code(transports: Sequence[Transport], pythons: Sequence[str], folders: Sequence[str]) -> None:
    """Have each node's interpreter for the ranks load our code.

    Raises:
        FailedError: it cannot.
    """

    def load(rank: int) -> None:
        transport = transports[rank]
        argv = ["env", f"PYTHONPATH={folders[rank]}", pythons[rank], "-P", "-c", "import launch.job, sparkctl.cli"]
        result = transport.run(argv, timeout=120.0)
        if result.status:
            said = result.stderr.decode(errors="replace").strip().splitlines()
            raise FailedError(
                f"{transport.name}: {pythons[rank]} cannot run sparkctl: {said[-1][:200] if said else 'no word why'}",
                "install what is missing there; it takes Python 3.11 or later",
            )

    _both(load)


def _both(act: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(act, (0, 1)))
