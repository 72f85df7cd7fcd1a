"""The copier on a node: offers a folder to the other node over the link, or fills one from there. It ends with its SSH session.

Sent to the nodes (see cluster.transport.shipped): standard library only, any Python from 3.8. `main` answers the orders that
cluster.stream describes; the token comes with them and is never in an argv. Whatever listens is bound to one address and lets in
only who proves to know the token.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from cluster.stream import SHAKE_SECONDS, StrangerError, admit, answering, connect, reason
from cluster.transfer.digests import common, usable
from cluster.transfer.manifest import Manifest
from cluster.transfer.pulling import Connection, Here, Pull, SourceError, Way, why
from cluster.transfer.shelf import Shelf
from cluster.transfer.staging import BusyError, DamagedError, NoRoomError, Staging

_BACKLOG = 32
_COMING_SECONDS = 60.0  # for the source to connect, where it is the one who does


class Door:
    """Listens on one address, never a wildcard; who proves to know the token is let in, each in a thread of its own."""

    def __init__(self, address: str, token: bytes, welcome: Callable[[socket.socket], None]) -> None:
        if IPv4Address(address).is_unspecified:
            raise ValueError("a listener has one address")
        self._token, self._welcome = token, welcome
        self._socket = socket.socket()
        try:
            self._socket.bind((address, 0))
            self._socket.listen(_BACKLOG)
        except BaseException:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        self.refused = 0
        self._places = threading.BoundedSemaphore(_BACKLOG)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if self._places.acquire(blocking=False):
                threading.Thread(target=self._receive, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _receive(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(SHAKE_SECONDS)
            admit(connection, self._token)
            self._welcome(connection)
        except StrangerError:
            self.refused += 1
            connection.close()
        except OSError:
            connection.close()  # the other side tells
        finally:
            self._places.release()


class Copier:
    """What one node does for a transfer."""

    def __init__(self) -> None:
        self._doors: list[Door] = []
        self._pull: Pull | None = None
        self._program: subprocess.Popen[bytes] | None = None

    def offer(self, root: str, addresses: list[str], token: str) -> dict[str, Any]:
        """Serve the files below `root` on each address: `doors` have its port, or why there is none; and our `digests`."""
        shelf = Shelf(root)

        def welcome(connection: socket.socket) -> None:
            with connection:
                shelf.serve(connection)

        doors = [self._listen(address, token, welcome) for address in addresses]
        return {"doors": doors, "digests": usable()}

    def fill(
        self,
        final: str,
        manifest: list[Any],
        flows: list[dict[str, Any]],
        digests: list[str],
        token: str,
        streams: int,
    ) -> dict[str, Any]:
        """Fill `final` over the link.

        `flows` are the rails to the source, as cluster.stream has them: shared out evenly. `digests` are those of the source.
        """
        key, digest = bytes.fromhex(token), common(digests)

        def ways() -> list[Connection]:
            opens = [partial(connect, token=key, **flow) for flow in flows]
            return [Connection(opens[at % len(opens)], digest) for at in range(streams)]

        return self.begin(final, manifest, ways)

    def fill_from_here(self, final: str, manifest: list[Any], root: str) -> dict[str, Any]:
        """Fill `final` from another folder of this node."""
        shelf = Shelf(root)
        return self.begin(final, manifest, lambda: [Here(shelf), Here(shelf)])

    def fill_from_caller(self, final: str, manifest: list[Any], token: str, streams: int) -> dict[str, Any]:
        """Fill `final` from a source that connects to this node's loopback, through the SSH connection: `port` says where."""
        coming: Queue[socket.socket] = Queue()

        def next_one() -> socket.socket:
            try:
                return coming.get(timeout=_COMING_SECONDS)
            except Empty:
                raise ConnectionError(0, "the source does not come") from None

        told = self.begin(final, manifest, lambda: [Connection(next_one) for _ in range(streams)])
        if told["state"] == "running":
            told["port"] = self._listen("127.0.0.1", token, coming.put)["port"]
        return told

    def rsync(self, argv: list[str]) -> dict[str, Any]:
        """Start rsync, which dies with this program."""
        self._program = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        return {"state": "running"}

    def rsynced(self, folder: str, final: str) -> dict[str, Any]:
        """How far rsync is: bytes in `folder`; at the end that takes the place `final`."""
        assert self._program is not None
        assert self._program.stderr is not None
        status = self._program.poll()
        done = sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*") if path.is_file())
        if status is None:
            return {"state": "running", "done": done}
        if status:
            said = self._program.stderr.read().decode(errors="replace").strip().splitlines()
            return {
                "state": "failed",
                "kind": "rsync",
                "error": f"rsync ended with {status}: {' '.join(said[-2:])[:300]}",
            }
        for path in Path(folder).rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        Path(folder).replace(final)
        return {"state": "done", "done": done}

    def remove(self, folder: str) -> None:
        """Remove a folder that a transfer has made."""
        shutil.rmtree(folder, ignore_errors=True)

    def begin(self, final: str, manifest: list[Any], ways: Callable[[], Sequence[Way]]) -> dict[str, Any]:
        """Fill `final` by `ways`, which are made if anything is missing; what `progress` would tell.

        Raises:
            ValueError: the manifest is none.
        """
        staging = Staging(final, Manifest.from_json(manifest))
        total = staging.manifest.moved
        if staging.complete:
            return {"state": "done", "done": total, "total": total}
        try:
            staging.begin()
        except NoRoomError as error:
            return {
                "state": "failed",
                "kind": "room",
                "error": str(staging.final.parent),
                "need": error.need,
                "free": error.free,
            }
        except OSError as error:
            return {"state": "failed", "kind": "busy" if isinstance(error, BusyError) else "disk", "error": why(error)}
        self._pull = pull = Pull(staging)
        threading.Thread(target=pull.run, args=(ways(),), daemon=True).start()
        return {"state": "running", "done": pull.done, "total": total}

    def progress(self) -> dict[str, Any]:
        """How far the filling is. `state`: running, done or failed, then with `kind` and `error`."""
        pull = self._pull
        assert pull is not None
        told = {"done": pull.done, "total": pull.total}
        if pull.running:
            return {"state": "running", **told}
        if pull.error is None:
            return {"state": "done", **told}
        return {"state": "failed", "kind": _kind(pull.error), "error": why(pull.error), **told}

    def _listen(self, address: str, token: str, welcome: Callable[[socket.socket], None]) -> dict[str, Any]:
        try:
            door = Door(address, bytes.fromhex(token), welcome)
        except OSError as error:
            return {"port": 0, "error": reason(error)}
        self._doors.append(door)
        return {"port": door.port, "error": ""}


def _kind(error: OSError) -> str:
    kinds = {SourceError: "source", DamagedError: "damaged", StrangerError: "stranger"}
    return kinds.get(type(error), "disk" if error.errno in (28, 122, 5, 30, 27) else "lost")


def main() -> None:
    """Answer orders until there are no more."""
    copier = Copier()
    answering(
        {
            "offer": copier.offer,
            "fill": copier.fill,
            "fill_from_here": copier.fill_from_here,
            "fill_from_caller": copier.fill_from_caller,
            "rsync": copier.rsync,
            "rsynced": copier.rsynced,
            "remove": copier.remove,
            "progress": copier.progress,
        }
    )
