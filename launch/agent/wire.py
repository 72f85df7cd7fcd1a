"""Between the two agents of a job: each tells the other all it knows, again and again, on every path there is.

A message is one UDP datagram: HMAC-SHA256 with the job's key, then JSON. What is told is the whole of the sender's state, so that a
lost message, a cut cable or a rebooted node needs no repair: the next message says it all. Two paths are the rails, the third the
management network, which tells a dead link from a dead node.

A message names its sender's session (a number drawn when the agent started), counts, and echoes the session that the sender has
last heard of. It is believed only if it echoes ours, and only if it is newer than the last: so what somebody recorded cannot be
played to us again. One that does not echo ours only tells who is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import FailedError

_TAG = 32  # bytes of HMAC-SHA256
MOST = 8192  # bytes of a datagram
# Linux: bind to an address that is not there yet. After a boot an agent may come up before the link's addresses do.
_IP_FREEBIND = 15


@dataclass(frozen=True)
class Path:
    """A way to the other node: addresses here and there. `rail` is its number on the link; None: the management network."""

    here: str
    there: str
    rail: int | None


class Wire:
    """This side's sockets, and the newest that was heard. `side` is 0 at the head, 1 at the peer.

    Raises:
        FailedError: another program has the port.
    """

    def __init__(self, key: str, job: str, side: int, paths: Sequence[Path], port: int) -> None:
        self._key = hashlib.sha256(f"sparkctl agent\0{job}\0{key}".encode()).digest()
        self._side = side
        self._port = port
        self._session = secrets.token_hex(8)
        self._theirs = ""
        self._sent = 0
        self._seen: dict[str, int] = {}  # the newest message of each session
        self._made = time.monotonic()
        self.body: dict[str, Any] | None = None
        self._heard: dict[Path, float] = {}
        self.paths = tuple(paths)
        self.sockets: dict[socket.socket, Path] = {}
        for path in self.paths:
            self._open(path)

    def _open(self, path: Path) -> None:
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            found.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            found.bind((path.here, self._port))
        except OSError as error:
            found.close()
            if path.rail is None:
                return  # the address is another's, behind whom the node hides: there is no second path then
            raise FailedError(
                f"{path.here}:{self._port}: {error.strerror}", "another program has the port: start the job again"
            ) from None
        self.sockets[found] = path

    def close(self) -> None:
        """Hear and say nothing more."""
        for one in self.sockets:
            one.close()
        self.sockets.clear()

    def tell(self, body: dict[str, Any]) -> None:
        """Send it on every path; one that is down is passed over."""
        self._sent += 1
        message = {"side": self._side, "session": self._session, "echo": self._theirs, "count": self._sent}
        payload = json.dumps(message | {"body": body}).encode()
        datagram = hmac.digest(self._key, payload, "sha256") + payload
        for one, path in self.sockets.items():
            with contextlib.suppress(OSError):
                one.sendto(datagram, (path.there, self._port))

    def take(self, ready: socket.socket) -> bool:
        """Read what has come to one of `sockets`; whether anything of it was new."""
        new = False
        with contextlib.suppress(OSError):  # BlockingIOError: that was all; else an answer that nobody listens there
            while True:
                datagram, _ = ready.recvfrom(MOST)
                new = self._believe(datagram, self.sockets[ready]) or new
        return new

    def silence(self, *, rails: bool = False) -> float:
        """Seconds since anything was heard: on any path, or on a rail."""
        times = [at for path, at in self._heard.items() if not rails or path.rail is not None]
        return time.monotonic() - max(times, default=self._made)

    def silence_of(self, rail: int) -> float:
        """Seconds since anything was heard on one rail."""
        heard = (at for path, at in self._heard.items() if path.rail == rail)
        return time.monotonic() - max(heard, default=self._made)

    def _believe(self, datagram: bytes, path: Path) -> bool:
        tag, payload = datagram[:_TAG], datagram[_TAG:]
        if not hmac.compare_digest(tag, hmac.digest(self._key, payload, "sha256")):
            return False
        message = json.loads(payload)  # it knew the key, so it is one of us
        if message["side"] == self._side:
            return False
        if message["session"] != self._theirs:
            # A new session: theirs has begun anew, or somebody plays an old one. If it is real it will echo ours from now on.
            if message["echo"] not in ("", self._session) and self._theirs:
                return False
            self._theirs = message["session"]
        if message["echo"] != self._session:
            return False
        self._heard[path] = time.monotonic()
        if message["count"] <= self._seen.get(self._theirs, -1):
            return False
        self._seen[self._theirs], self.body = message["count"], message["body"]
        return True
