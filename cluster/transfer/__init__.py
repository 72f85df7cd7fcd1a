"""Files, and ranges of files, into a folder on a node: over the link, from this machine, or from another folder of the node.

Between the nodes a copier of ours runs at both ends (cluster.transfer.copier), over both rails; where the ports of the link are
closed, rsync over SSH. A transfer that was interrupted is taken up by the next one for the same folder. The folder appears when
every byte of it has arrived, was verified and lies on the disk.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, Self

from cluster.errors import FailedError, RefusedError, SparkctlError
from cluster.stream import connect
from cluster.transfer import rsync
from cluster.transfer.manifest import Manifest
from cluster.transfer.shelf import Shelf
from cluster.transport import Transport, shipped
from cluster.yamlcore import printable

MODULES = (
    "cluster.stream",
    "cluster.transfer.digests",
    "cluster.transfer.manifest",
    "cluster.transfer.shelf",
    "cluster.transfer.staging",
    "cluster.transfer.pulling",
    "cluster.transfer.copier",
)
STREAMS = 4
_GIB = 2**30
_POLL = 0.2
_ANSWER_SECONDS = 60.0
_LAST_SECONDS = 1800.0  # rsync's files are brought to the disk in one order


@dataclass(frozen=True)
class Progress:
    """Bytes of a transfer to a node that lie there, of how many; `how` is what carries them now."""

    node: str
    done: int
    total: int
    how: str


Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class End:
    """A node of a pair, its addresses on the link, one for each rail, and the Python of its environment (empty: none is known)."""

    transport: Transport
    addresses: tuple[str, ...]
    python: str = ""


def over_link(source: End, root: str, target: End, final: str, manifest: Manifest, watch: Watch) -> None:
    """From the folder `root` of one node into the folder `final` of the other: 4 streams, shared out over the rails.

    Raises:
        RefusedError: the target's disk has not the room.
        FailedError: a node or the link was lost, or the source cannot be read; what has arrived stays, for the next attempt.
    """
    token = secrets.token_hex(32)
    with Helper.at(source) as giving, Helper.at(target) as taking:
        offer = giving.ask("offer", root=root, addresses=list(source.addresses), token=token)
        flows = [
            {"source": ours, "address": theirs, "port": door["port"]}
            for ours, theirs, door in zip(target.addresses, source.addresses, offer["doors"], strict=True)
            if door["port"]
        ]
        if not flows:
            raise FailedError(
                f"{source.transport.name}: nothing can listen on the link: {printable(str(offer['doors'][0]['error']))}",
                "`sparkctl up` sets its addresses; `sparkctl doctor` looks at the link",
            )
        told = taking.ask(
            "fill",
            final=final,
            manifest=manifest.to_json(),
            flows=flows,
            digests=offer["digests"],
            token=token,
            streams=STREAMS,
        )
        told = followed(taking, told, watch, "over the link", (giving,))
        if told["state"] == "done":
            return
        if told["kind"] != "lost" or told.get("done", 0):
            raise failure(target.transport.name, final, told)
        _by_rsync(giving, taking, source, root, target, final, manifest, watch)


def from_here(root: str, target: Transport, final: str, manifest: Manifest, watch: Watch) -> None:
    """From a folder of this machine into one of a node, through its SSH connection.

    Raises:
        RefusedError, FailedError: see `over_link`.
    """
    token, shelf = secrets.token_hex(32), Shelf(root)
    with Helper(target) as taking, closing(shelf):
        told = taking.ask("fill_from_caller", final=final, manifest=manifest.to_json(), token=token, streams=2)
        if "port" in told:
            port = target.forward(int(told["port"]))
            for _ in range(2):
                threading.Thread(target=_serve, args=(shelf, port, bytes.fromhex(token)), daemon=True).start()
        told = followed(taking, told, watch, "from this machine", ())
    if told["state"] != "done":
        raise failure(target.name, final, told)


def within(root: str, target: Transport, final: str, manifest: Manifest, watch: Watch) -> None:
    """From one folder of a node into another.

    Raises:
        RefusedError, FailedError: see `over_link`.
    """
    with Helper(target) as taking:
        told = taking.ask("fill_from_here", final=final, manifest=manifest.to_json(), root=root)
        told = followed(taking, told, watch, "on its disk", ())
    if told["state"] != "done":
        raise failure(target.name, final, told)


def _serve(shelf: Shelf, port: int, token: bytes) -> None:
    try:
        with connect("127.0.0.1", "127.0.0.1", port, token) as connection:
            shelf.serve(connection)
    except OSError:
        return  # the node tells


def _by_rsync(
    giving: Helper, taking: Helper, source: End, root: str, target: End, final: str, manifest: Manifest, watch: Watch
) -> None:
    """What rsync copies are whole files: the source cuts the folder out on its own disk first."""
    place = PurePosixPath(final)
    cut = PurePosixPath(source.transport.home().sparkctl) / "halves" / f".{place.name}.outgoing"
    told = giving.ask("fill_from_here", final=str(cut), manifest=manifest.to_json(), root=root)
    told = followed(giving, told, watch, "cut out for rsync", (taking,))
    if told["state"] != "done":
        raise failure(source.transport.name, str(cut), told)
    taking.ask("remove", folder=str(place.with_name(f".{place.name}.part")))  # it holds nothing but the room
    beside = place.with_name(f".{place.name}.rsync")
    user = source.transport.run(["id", "-un"]).stdout.decode(errors="replace").split()[-1]
    argv = rsync.argv(f"{user}@{source.addresses[0]}", str(cut), str(beside), target.transport.home().sparkctl)
    taking.ask("rsync", argv=argv)
    while True:
        told = taking.ask("rsynced", folder=str(beside), final=final, within=_LAST_SECONDS)
        if told["state"] != "running":
            break
        watch(Progress(target.transport.name, min(told["done"], manifest.size), manifest.size, "rsync over SSH"))
        giving.nudge()
        time.sleep(_POLL)
    giving.ask("remove", folder=str(cut))
    if told["state"] != "done":
        raise failure(target.transport.name, final, told)
    watch(Progress(target.transport.name, manifest.size, manifest.size, "rsync over SSH"))


def followed(helper: Helper, told: dict[str, Any], watch: Watch, how: str, others: Sequence[Helper]) -> dict[str, Any]:
    """Watch a transfer to its end; returns how it ended, as `Copier.progress` tells it."""
    while True:
        if "total" in told:
            watch(Progress(helper.node, int(told["done"]), int(told["total"]), how))
        if told["state"] != "running":
            return told
        time.sleep(_POLL)
        told = helper.ask("progress")
        for other in others:  # who hears nothing for a minute takes us for gone
            other.nudge()


def failure(node: str, final: str, told: dict[str, Any]) -> SparkctlError:
    """Why a transfer has failed, as its user reads it."""
    name, said = PurePosixPath(final).name, printable(str(told["error"])[:300])
    again = "what has arrived is kept: run it again and it goes on from there"
    if told["kind"] == "room":
        need, free = int(told["need"]) / _GIB, int(told["free"]) / _GIB
        return RefusedError(
            f"{node}: no room for {name}: it takes {need:.1f} GiB, and {free:.1f} GiB are free in {said}",
            "make room there; `sparkctl clean` shows what sparkctl itself could give back",
        )
    fixes = {
        "busy": "wait for it to end",
        "disk": "look at that disk; " + again,
        "source": "is the model still there, and whole? " + again,
        "damaged": "download the model again at its source, or look at the link: `sparkctl doctor`",
        "stranger": "something else listens on that address; look at the link: `sparkctl doctor`",
        "rsync": "`sparkctl doctor` looks at the link and the nodes' keys",
    }
    return FailedError(f"{node}: {name} could not be copied: {said}", fixes.get(told["kind"], again))


class Helper:
    """The copier on one node, for as long as the block runs."""

    def __init__(self, transport: Transport, argv: Sequence[str] = (), modules: Sequence[str] = ()) -> None:
        """`argv` starts another program that answers the same way, `modules` are what it takes in first; else it is the copier."""
        self.node = transport.name
        self._session = transport.session(argv or shipped.argv(transport.python))
        sent = modules if argv else MODULES
        self._first = shipped.modules(sent) if sent else b""

    @classmethod
    def at(cls, end: End) -> Self:
        """The copier in a node's environment, where that is known: it has xxhash."""
        return cls(end.transport, shipped.argv(end.python, site=True) if end.python else (), MODULES)

    def ask(self, order: str, *, within: float = _ANSWER_SECONDS, **arguments: object) -> Any:
        """Have an order carried out.

        Raises:
            FailedError: the node is lost, or cannot.
        """
        line, self._first = self._first + json.dumps([order, arguments]).encode(), b""
        try:
            answer = json.loads(self._session.ask(line, timeout=within))
        except (ValueError, RecursionError):
            answer = {"failed": "an answer that makes no sense"}
        if not isinstance(answer, dict) or "done" not in answer:
            said = answer.get("failed") if isinstance(answer, dict) else answer
            raise FailedError(f"{self.node}: files cannot be copied: {printable(str(said)[:200])}", "try again")
        return answer["done"]

    def nudge(self) -> None:
        """Show that we are still here."""
        self._session.nudge()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()
