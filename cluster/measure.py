"""Measure what the link gives: packets of full size, streams of our own, RDMA writes where ib_write_bw is installed.

The streams' helper (cluster.stream) runs on both nodes in a session each; it listens on the rails' addresses only. Everything
takes a bounded time. What fails on a rail is part of the result; only a node that is lost ends a measurement.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from cluster.errors import FailedError
from cluster.link import LinkPlan
from cluster.measurement import SMALL, Flow, Measurement, Message, Ping, Run, Wire, nodes, wires
from cluster.transport import Result, Transport, shipped
from cluster.yamlcore import printable

T = TypeVar("T")
Pair = tuple[T, T]

MESSAGE = 8 << 20  # bytes of the large message
HEADERS = 28  # bytes of an echo request beside its payload: 20 of IPv4, 8 of ICMP
_PATIENCE = 40.0  # seconds beyond the streams' own for the helper to answer: connecting, stalling, draining
_PORT = 18515  # perftest's own; rail 1 takes the next
_CONNECTING = 5.0  # seconds for the other end of ib_write_bw to listen
_SETTING_UP = 6.0  # seconds for that, and for its memory and queues, at both ends
_UNHEARD = b"Couldn't connect to"  # perftest, where nobody listens (yet)
_LATE = 124  # the exit status of `timeout`
_MOST_OF = 0.9  # of the bytes must show in an interface's counter to have come in by it; headers come on top


def measure(
    plan: LinkPlan, transports: Pair[Transport], *, rdma: bool, seconds: float = 2.0, streams: int = 4
) -> Measurement:
    """Measure the rails of a plan, whose addresses the nodes have: both at once in both directions, and each alone.

    A rail on which no streams pass is not tried further: each try would take seconds.

    Args:
        transports: to the head and to the peer.
        rdma: whether both nodes have ib_write_bw (`Facts.has_tool`); the streams then only prove the path, and take a quarter of
            the time.
        seconds: for each run.
        streams: TCP connections for each rail.

    Raises:
        FailedError: a node is lost, or its Python does not work.
    """
    rails = wires(plan)
    with ExitStack() as stack:
        ends = tuple(stack.enter_context(_Helper(transport)) for transport in transports)
        bench = _Bench((ends[0], ends[1]), transports, rails)
        try:
            pings = bench.pings()
            bench.listen()
            runs = bench.there_and_back(partial(bench.tcp, seconds / 4 if rdma else seconds, streams))
            alive = [rail for rail in (0, 1) if not any(run.flows[rail].error for run in runs)]
            messages = tuple(bench.message(rail, sender) for rail in alive for sender in (0, 1))
            one = partial(bench.tcp, seconds, streams)
            if rdma:
                one = partial(bench.rdma, seconds)
                written = bench.there_and_back(one) if len(alive) == 2 else ()
                alive = [rail for rail in alive if not any(run.flows[rail].error for run in written)]
                runs += written
            runs += tuple(one((rail,), 0) for rail in alive)
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # a node is broken, or hostile
            said = printable(f"{type(error).__name__}: {error}"[:200])
            raise FailedError(
                f"the link cannot be measured: a node's answer makes no sense ({said})", "try again"
            ) from None
    return Measurement(time.time(), nodes(plan), rails, pings, runs, messages)


class _Helper:
    """cluster.stream on one node."""

    def __init__(self, transport: Transport) -> None:
        self._node = transport.name
        self._session = transport.session(shipped.argv(transport.python))
        self._first = shipped.modules(["cluster.stream"])

    def ask(self, order: str, *, within: float = _PATIENCE, **arguments: object) -> Any:
        """Have an order carried out."""
        line, self._first = self._first + json.dumps([order, arguments]).encode(), b""
        try:
            answer = json.loads(self._session.ask(line, timeout=within))
        except (ValueError, RecursionError):
            answer = {"failed": "an answer that makes no sense"}
        if "done" not in answer:
            raise FailedError(
                f"{self._node}: the link cannot be measured: {printable(str(answer['failed'])[:200])}", "try again"
            )
        return answer["done"]

    def __enter__(self) -> _Helper:
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()


class _Bench:
    """Two nodes and their rails, and the runs that they are put through."""

    def __init__(self, ends: Pair[_Helper], transports: Pair[Transport], rails: Pair[Wire]) -> None:
        self._ends = ends
        self._transports = transports
        self._rails = rails
        self._token = secrets.token_hex(32)
        self._listeners: list[list[dict[str, Any]]] = []  # by rank, then by rail

    def listen(self) -> None:
        """Have both nodes listen on both rails, and on nothing else."""
        for rank, end in enumerate(self._ends):
            addresses = [wire.addresses[rank] for wire in self._rails]
            self._listeners.append(end.ask("listen", addresses=addresses, token=self._token))

    def there_and_back(self, one: Callable[[Sequence[int], int], Run]) -> tuple[Run, ...]:
        """Both rails at once, from the head and then from the peer; not back where nothing went there."""
        there = one((0, 1), 0)
        return (there,) if all(flow.error for flow in there.flows) else (there, one((0, 1), 1))

    # Packets.

    def pings(self) -> tuple[Ping, ...]:
        """From both ends of both rails at once, with packets of full size; where those are lost, small ones tell why."""
        places = [(rail, sender) for rail in (0, 1) for sender in (0, 1)]
        full = _at_once([partial(self._ping, *place, self._rails[place[0]].mtu) for place in places])
        lost = [(ping.rail, ping.sender) for ping in full if ping.received < ping.sent or not ping.sent]
        return (*full, *_at_once([partial(self._ping, *place, SMALL) for place in lost]))

    def _ping(self, rail: int, sender: int, size: int) -> Ping:
        wire = self._rails[rail]
        argv = ping_argv(wire.interfaces[sender], wire.addresses[1 - sender], size)
        try:
            result = self._transports[sender].run(argv, timeout=15.0)
        except FailedError as error:
            return Ping(rail, sender, size, 0, 0, error=error.message)
        return read_ping(result, rail, sender, size)

    # TCP.

    def tcp(self, seconds: float, streams: int, rails: Sequence[int], sender: int) -> Run:
        """Streams over the rails at once."""
        ready = [rail for rail in rails if self._listeners[1 - sender][rail]["port"]]
        flows = {rail: Flow(rail, 0.0, self._listeners[1 - sender][rail]["error"]) for rail in rails}
        if ready:
            before = self._ends[1 - sender].ask("counters")
            tallies = self._ends[sender].ask(
                "stream",
                within=seconds + _PATIENCE,
                flows=[self._flow(rail, sender) for rail in ready],
                token=self._token,
                seconds=seconds,
                streams=streams,
            )
            after = self._ends[1 - sender].ask("counters")
            grown = {name: after[name][0] - before[name][0] for name in before.keys() & after.keys()}
            for rail, tally in zip(ready, tallies, strict=True):
                flows[rail] = _flow(rail, tally, self._rails[rail].interfaces[1 - sender], grown)
        return Run("tcp", sender, tuple(flows[rail] for rail in rails))

    def message(self, rail: int, sender: int) -> Message:
        """One large message over a rail on which streams have passed."""
        flow = self._flow(rail, sender)
        said = self._ends[sender].ask("message", **flow, token=self._token, size=MESSAGE)
        return Message(rail, sender, MESSAGE, _finite(said["seconds"]), said["intact"] is True, _told(said["error"]))

    def _flow(self, rail: int, sender: int) -> dict[str, Any]:
        addresses = self._rails[rail].addresses
        port = self._listeners[1 - sender][rail]["port"]
        return {"source": addresses[sender], "address": addresses[1 - sender], "port": port}

    # RDMA.

    def rdma(self, seconds: float, rails: Sequence[int], sender: int) -> Run:
        """ib_write_bw over the rails at once."""
        gids = tuple(
            end.ask("gids", devices=[[wire.hcas[rank], wire.addresses[rank]] for wire in self._rails])
            for rank, end in enumerate(self._ends)
        )
        flows = _at_once(
            [partial(self._write, rail, sender, seconds, (gids[0][rail], gids[1][rail])) for rail in rails]
        )
        return Run("rdma", sender, tuple(flows))

    def _write(self, rail: int, sender: int, seconds: float, gids: Pair[int | None]) -> Flow:
        """RDMA writes over one rail: both ends at once, the sender until there is somebody to connect to."""
        wire, listener, port = self._rails[rail], 1 - sender, _PORT + rail
        listening = perftest_argv(wire, listener, port=port, seconds=seconds, gid=gids[listener])
        sending = perftest_argv(wire, sender, port=port, seconds=seconds, gid=gids[sender], to=wire.addresses[listener])
        limit = seconds + _SETTING_UP + 5
        heard, sent = _at_once(
            [
                partial(_tried, self._transports[listener], listening, limit, 0.0),
                partial(_tried, self._transports[sender], sending, limit, _CONNECTING),
            ]
        )
        gbps = read_perftest(sent.stdout.decode(errors="replace"))
        if gbps is not None:
            return Flow(rail, gbps)
        unheard = _UNHEARD in sent.stderr + sent.stdout and heard.status not in (0, _LATE)
        return Flow(rail, 0.0, perftest_error(heard if unheard else sent))


def _tried(transport: Transport, argv: Sequence[str], limit: float, insist: float) -> Result:
    """Run a command, and for `insist` seconds again as long as it finds nobody to connect to."""
    end = time.monotonic() + insist
    while True:
        try:
            result = transport.run(argv, timeout=limit)
        except FailedError as error:
            return Result(tuple(argv), -1, b"", error.message.encode())
        if _UNHEARD not in result.stderr + result.stdout or time.monotonic() > end:
            return result
        time.sleep(0.2)


def _at_once(acts: Sequence[Callable[[], T]]) -> list[T]:
    """Do all of them at the same time; what they gave, in their order."""
    with ThreadPoolExecutor(max(1, len(acts))) as pool:
        return [future.result() for future in [pool.submit(act) for act in acts]]


def _flow(rail: int, tally: dict[str, Any], interface: str, grown: dict[str, int]) -> Flow:
    """A helper's tally of a rail, and the interface of the receiver whose counter shows these bytes."""
    received, seconds = int(tally["received"]), _finite(tally["seconds"])
    most = max(grown, key=lambda name: grown[name], default=None)
    arrived = interface if grown.get(interface, 0) >= _MOST_OF * received else most
    if not received:
        arrived = None
    return Flow(
        rail,
        gbps=received * 8 / seconds / 1e9 if seconds > 0 else 0.0,
        error=_told(tally["error"]),
        sent=int(tally["sent"]),
        received=received,
        seconds=seconds,
        arrived=arrived,
    )


def _finite(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value} for a number of seconds")
    return float(value)


def _told(text: object) -> str:
    return printable(str(text)[:200])


# The commands, and what they print. Pure.


def ping_argv(interface: str, address: str, size: int) -> list[str]:
    """Three packets of `size` bytes with "do not fragment" set (`-M do`), through one interface and no other."""
    options = ["-n", "-M", "do", "-s", str(size - HEADERS), "-c", "3", "-i", "0.2", "-W", "1", "-I", interface]
    return ["env", "LC_ALL=C", "ping", *options, address]


def read_ping(result: Result, rail: int, sender: int, size: int) -> Ping:
    """Read what iputils' ping prints; `error` where packets were lost: "message too long, mtu=1500", or that none came back."""
    text = result.stdout.decode(errors="replace")
    counted = re.search(r"(\d{1,6}) packets transmitted, (\d{1,6}) received", text)
    times = re.search(r"= [\d.]+/([\d.]{1,12})/", text)
    sent, received = (int(counted[1]), int(counted[2])) if counted else (0, 0)
    error = ""
    if received < sent or not sent:
        said = re.search(
            r"(message too long.*|Frag needed.*|.*[Uu]nreachable.*)", text + result.stderr.decode(errors="replace")
        )
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        error = said[1] if said else lines[-1] if lines else f"{sent - received} of {sent} packets lost"
    return Ping(rail, sender, size, sent, received, float(times[1]) if times else None, _told(error.strip()))


def perftest_argv(
    wire: Wire, rank: int, *, port: int, seconds: float, gid: int | None, to: str | None = None
) -> list[str]:
    """ib_write_bw for one end of a rail: it listens, or with `to` writes to who listens there.

    `timeout` ends it where nobody does. It meets its counterpart on the rail's address alone (--bind_source_ip), and uses `gid`,
    the row of the GID table that is this address in RoCE v2: its own choice differs between the boxes, and then nothing goes.
    """
    return [
        *("timeout", "--kill-after=1", f"{seconds + _SETTING_UP:g}", "ib_write_bw", "-d", wire.hcas[rank]),
        *("-p", str(port), "-D", str(max(1, round(seconds))), "-F", "--report_gbits"),
        f"--bind_source_ip={wire.addresses[rank]}",
        *(["-x", str(gid)] if gid is not None else []),
        *([to] if to else []),
    ]


def read_perftest(text: str) -> float | None:
    """The average bandwidth in Gb/s of ib_write_bw's table, which is in Gb/s with --report_gbits; None: there is none."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    for header, row in pairwise(lines):
        if "BW average[Gb/sec]" in header and len(row) == len(header):
            value = row[header.index("BW average[Gb/sec]")]
            return float(value) if re.fullmatch(r"\d{1,6}(\.\d{1,9})?", value) else None
    return None


def perftest_error(result: Result) -> str:
    """Why ib_write_bw gave no figure, in its own words."""
    if result.status == _LATE:
        return "ib_write_bw hangs"
    lines = (result.stderr or result.stdout).decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip(" -*\t")]
    return _told("; ".join(said[-2:]) or f"ib_write_bw: exit status {result.status}")
