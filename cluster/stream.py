"""Bytes through a rail, counted at both ends: what the link gives to TCP, and by which interfaces it went.

Sent to both nodes (see cluster.transport.shipped): standard library only, any Python from 3.8. `main` answers orders, one line of
JSON each, until its input ends: ["name", {argument: value}] gives {"done": value} or {"failed": text}.

A listener is bound to one address and takes in only what comes from somebody who proves to know the measurement's token:

    listener  32 random bytes A
    sender    32 random bytes B, HMAC-SHA256(token, "sender" A B)
    listener  HMAC-SHA256(token, "listener" A B)
    sender    one byte, STREAM or MESSAGE, and its bytes, to the end of its half of the connection
    listener  a REPORT: how many bytes came, its clock at the first and at the last of them, and of a MESSAGE the SHA-256
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

MARK = "\x1e"
STREAM, MESSAGE = b"S", b"M"
REPORT = struct.Struct("!Qdd32s")

CHUNK = 1 << 20  # bytes of one send
CONNECT_SECONDS = 4.0  # an address that nobody has is given up by the kernel after 3
SHAKE_SECONDS = 8.0  # for the proof, and until the other rail is connected or given up
STALL_SECONDS = 5.0  # without a byte: the rail is gone
DRAIN_SECONDS = 10.0  # for what lies in buffers as the time is up
MOST_CONNECTIONS = 64  # of one listener at a time
SILENCE_SECONDS = 60  # without an order: whoever gives them is gone


@dataclass(frozen=True)
class Tally:
    """What came of one connection: bytes, and the listener's clock (s) at the first and the last of them."""

    sent: int = 0
    received: int = 0
    first: float = 0.0
    last: float = 0.0
    digest: bytes = b""
    error: str = ""


@dataclass(frozen=True)
class Flow:
    """What came of all connections over one rail; `seconds` from its first byte to its last, at the listener."""

    sent: int
    received: int
    seconds: float
    error: str


class StrangerError(OSError):
    """The other side does not know the token."""


# Proof.


def proof(token: bytes, role: bytes, listener: bytes, sender: bytes) -> bytes:
    """What shows that a side knows the token, good for this one connection and for this side."""
    return hmac.new(token, role + listener + sender, hashlib.sha256).digest()


def exactly(connection: socket.socket, size: int) -> bytes:
    """The next `size` bytes."""
    found = bytearray()
    while len(found) < size:
        data = connection.recv(size - len(found))
        if not data:
            raise ConnectionResetError(0, "the other side has hung up")
        found += data
    return bytes(found)


def admit(connection: socket.socket, token: bytes) -> None:
    """The listener's side of the proof.

    Raises:
        StrangerError: the sender does not know the token.
    """
    challenge = os.urandom(32)
    connection.sendall(challenge)
    answer = exactly(connection, 64)
    theirs, shown = answer[:32], answer[32:]
    if not hmac.compare_digest(shown, proof(token, b"sender", challenge, theirs)):
        raise StrangerError(0, "the token is wrong")
    connection.sendall(proof(token, b"listener", challenge, theirs))


def introduce(connection: socket.socket, token: bytes) -> None:
    """The sender's side of the proof.

    Raises:
        StrangerError: the listener has hung up on us, or does not know the token itself.
    """
    challenge, ours = exactly(connection, 32), os.urandom(32)
    connection.sendall(ours + proof(token, b"sender", challenge, ours))
    try:
        shown = exactly(connection, 32)
    except ConnectionResetError:
        raise StrangerError(0, "the listener does not accept the token") from None
    if not hmac.compare_digest(shown, proof(token, b"listener", challenge, ours)):
        raise StrangerError(0, "the listener does not know the token")


# Receiving.


class Listener:
    """Takes in what senders that know the token send to one address of this machine. `address` is never a wildcard."""

    def __init__(self, address: str, token: bytes) -> None:
        if IPv4Address(address).is_unspecified:
            raise ValueError("a listener has one address")
        self._token = token
        self._socket = socket.socket()
        try:
            self._socket.bind((address, 0))
            self._socket.listen(MOST_CONNECTIONS)
        except BaseException:
            self._socket.close()
            raise
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._counting = threading.Lock()
        self.port: int = self._socket.getsockname()[1]
        self.received = 0
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take in nothing more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if self._places.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(SHAKE_SECONDS)
                admit(connection, self._token)
                kind = exactly(connection, 1)
                connection.settimeout(DRAIN_SECONDS)
                connection.sendall(self._take_in(connection, kind))
        except StrangerError:
            with self._counting:
                self.refused += 1
        except OSError:
            pass  # the sender tells
        finally:
            self._places.release()

    def _take_in(self, connection: socket.socket, kind: bytes) -> bytes:
        buffer = bytearray(CHUNK)
        view = memoryview(buffer)
        digest = hashlib.sha256()
        total, first, last = 0, 0.0, 0.0
        try:
            while True:
                size = connection.recv_into(buffer)
                if not size:
                    break
                last = time.monotonic()
                first = first or last
                total += size
                if kind == MESSAGE:
                    digest.update(view[:size])
        finally:
            with self._counting:
                self.received += total
        return REPORT.pack(total, first, last, digest.digest())


# Sending.


def connect(source: str, address: str, port: int, token: bytes) -> socket.socket:
    """A connection from one address to another, with the proof given."""
    connection = socket.create_connection((address, port), CONNECT_SECONDS, (source, 0))
    try:
        connection.settimeout(SHAKE_SECONDS)
        introduce(connection, token)
        connection.settimeout(STALL_SECONDS)
    except BaseException:
        connection.close()
        raise
    return connection


def pump(connection: socket.socket, end: float) -> Tally:
    """Send until the clock (time.monotonic) says `end`, then have the listener tell what came."""
    payload = bytes(CHUNK)
    sent = 0
    with connection:
        try:
            connection.sendall(STREAM)
            while time.monotonic() < end:
                sent += connection.send(payload)
            return told(connection, sent)
        except OSError as error:
            return Tally(sent=sent, error=reason(error))


def told(connection: socket.socket, sent: int) -> Tally:
    """The listener's report, after the last byte."""
    connection.settimeout(DRAIN_SECONDS)
    connection.shutdown(socket.SHUT_WR)
    received, first, last, digest = REPORT.unpack(exactly(connection, REPORT.size))
    return Tally(sent, received, first, last, digest)


def reason(error: OSError) -> str:
    """What went wrong on the way, in words."""
    if isinstance(error, socket.timeout):
        return "no answer, or nothing went through, for seconds"
    return error.strerror or str(error) or type(error).__name__


def stream(flows: list[dict[str, Any]], token: bytes, seconds: float, streams: int) -> list[Flow]:
    """Send over several rails at once, `streams` connections each, all of them connected before the first byte.

    Args:
        flows: `source`, `address` and `port` of each.
    """
    each = [flow for flow in flows for _ in range(streams)]
    with ThreadPoolExecutor(len(each)) as pool:
        opened = list(pool.map(lambda flow: attempt(flow, token), each))
        end = time.monotonic() + seconds
        tallies = list(pool.map(lambda one: one if isinstance(one, Tally) else pump(one, end), opened))
    return [summed(tallies[at : at + streams]) for at in range(0, len(tallies), streams)]


def attempt(flow: dict[str, Any], token: bytes) -> socket.socket | Tally:
    """A connection, or why there is none."""
    try:
        return connect(flow["source"], flow["address"], flow["port"], token)
    except OSError as error:
        return Tally(error=reason(error))


def summed(tallies: list[Tally]) -> Flow:
    """The connections of one rail as one."""
    began = [tally.first for tally in tallies if tally.received]
    seconds = max(tally.last for tally in tallies) - min(began) if began else 0.0
    error = next((tally.error for tally in tallies if tally.error), "")
    return Flow(sum(tally.sent for tally in tallies), sum(tally.received for tally in tallies), seconds, error)


def message(source: str, address: str, port: int, token: bytes, size: int) -> dict[str, Any]:
    """One large message as a whole, and whether it arrived as it left. `seconds` until the listener had said so."""
    data = os.urandom(size)
    try:
        with connect(source, address, port, token) as connection:
            began = time.monotonic()
            connection.settimeout(DRAIN_SECONDS)
            connection.sendall(MESSAGE + data)
            tally = told(connection, size)
    except OSError as error:
        return {"intact": False, "seconds": 0.0, "error": reason(error)}
    intact = tally.received == size and tally.digest == hashlib.sha256(data).digest()
    return {"intact": intact, "seconds": time.monotonic() - began, "error": ""}


# Looking.


def counters() -> dict[str, list[int]]:
    """Bytes that each interface of this network namespace has received and sent."""
    found = {}
    for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        columns = numbers.split()
        found[name.strip()] = [int(columns[0]), int(columns[8])]
    return found


def gid(device: str, address: str) -> int | None:
    """The row of a RoCE device's GID table that is this IPv4 address in version 2 of RoCE, as the table is now."""
    wanted = IPv4Address(address).packed.hex()
    port = Path("/sys/class/infiniband") / Path(device).name / "ports" / "1"
    for path in sorted((port / "gids").glob("*")):
        with contextlib.suppress(OSError, ValueError):
            kind = (port / "gid_attrs" / "types" / path.name).read_text().strip()
            if kind == "RoCE v2" and path.read_text().strip().replace(":", "") == f"{'0' * 20}ffff{wanted}":
                return int(path.name)
    return None


# Orders.


class Bench:
    """What one node does for a measurement."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def listen(self, addresses: list[str], token: str) -> list[dict[str, Any]]:
        """A listener on each address: its port, or why there is none."""
        found: list[dict[str, Any]] = []
        for address in addresses:
            try:
                listener = Listener(address, bytes.fromhex(token))
            except OSError as error:
                found.append({"port": 0, "error": reason(error)})
            else:
                self._listeners.append(listener)
                found.append({"port": listener.port, "error": ""})
        return found

    def stream(self, flows: list[dict[str, Any]], token: str, seconds: float, streams: int) -> list[dict[str, Any]]:
        """See `stream`."""
        return [asdict(flow) for flow in stream(flows, bytes.fromhex(token), seconds, streams)]

    def message(self, source: str, address: str, port: int, token: str, size: int) -> dict[str, Any]:
        """See `message`."""
        return message(source, address, port, bytes.fromhex(token), size)

    def counters(self) -> dict[str, list[int]]:
        """See `counters`."""
        return counters()

    def gids(self, devices: list[list[str]]) -> list[int | None]:
        """See `gid`: for pairs of device and address."""
        return [gid(device, address) for device, address in devices]


def main() -> None:
    """Answer orders until there are no more."""
    bench = Bench()
    answering(
        {
            "listen": bench.listen,
            "stream": bench.stream,
            "message": bench.message,
            "counters": bench.counters,
            "gids": bench.gids,
        }
    )


def answering(orders: dict[str, Callable[..., Any]]) -> None:
    """Answer orders, by their names, until standard input ends or falls silent."""
    while True:
        signal.alarm(SILENCE_SECONDS)  # its signal ends this program
        line = sys.stdin.buffer.readline()
        signal.alarm(0)
        if not line:
            return
        if line.strip():
            print(f"{MARK}{json.dumps(obeyed(orders, line))}", flush=True)  # noqa: T201 - the answer


def obeyed(orders: dict[str, Callable[..., Any]], line: bytes) -> dict[str, Any]:
    """The answer to one order."""
    try:
        name, arguments = json.loads(line)
        return {"done": orders[name](**arguments)}
    except Exception as error:  # noqa: BLE001, RUF100 - whatever it is, whoever gave the order must learn of it
        return {"failed": f"{type(error).__name__}: {error}"}
