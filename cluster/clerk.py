"""One host of a pair and its journal there: a session as its user, and one as root, that carry out orders (cluster.journal)."""

from __future__ import annotations

import errno
import getpass
import json
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.changes import (
    Books,
    Change,
    CommandChange,
    Damaged,
    Entry,
    FileChange,
    Holder,
    LinesChange,
    MakeChange,
    Planned,
    State,
    Undone,
    decode,
    diff,
    encode,
)
from cluster.errors import FailedError, RefusedError, SparkctlError
from cluster.transport import Home, Transport, shipped
from cluster.transport.process import Session
from cluster.transport.sudo import Sudo

Tell = Callable[[str, str], None]

NUDGE = 8.0  # seconds; cluster.journal takes SILENCE for our end
MODULES = ("cluster.changes", "cluster.acts", "cluster.journal")
_ORDER_SECONDS = 60.0


@dataclass(frozen=True)
class Host:
    """A node to change, and how to become root there. Without `sudo`, changes are made as the user that logs in."""

    transport: Transport
    sudo: Sudo | None = None

    @property
    def name(self) -> str:
        """The node's name."""
        return self.transport.name


@dataclass(frozen=True)
class Look:
    """What a look at a host found: each change with what is there for it, the journal's books, and where things go."""

    planned: tuple[Planned, ...]
    books: Books
    home: Home


@dataclass(frozen=True)
class Leftover:
    """A change that was not undone: why, and for a file what was changed in it since, as the lines of a diff."""

    node: str
    title: str
    reason: str
    diff: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What undoing came to on a host.

    Args:
        undone: titles of what was undone, in that order.
        left: left alone since somebody else has changed it; with `force` it is undone all the same.
        failed: tried in vain; to be tried again.
        error: why the host was not looked at to the end.
    """

    node: str
    undone: tuple[str, ...] = ()
    left: tuple[Leftover, ...] = ()
    failed: tuple[Leftover, ...] = ()
    error: SparkctlError | None = None

    @property
    def complete(self) -> bool:
        """Whether all of it was undone."""
        return not self.left and not self.failed and self.error is None


class Clerk:
    """Our side of a host's journal: the user's session with it and root's, each opened when it is first needed."""

    def __init__(self, host: Host) -> None:
        self.name = host.name
        self._host = host
        self._sessions: dict[bool, Session] = {}
        self._home: Home | None = None
        self._done = threading.Event()

    @property
    def lost(self) -> bool:
        """Whether a session has ended by itself."""
        return any(session.closed for session in self._sessions.values())

    def ask(self, order: str, *arguments: object, root: bool = False, seconds: float = _ORDER_SECONDS) -> Any:
        """Have an order carried out.

        Raises:
            FailedError: with what the host said; or the session is lost.
        """
        session = self._session(root=root and self._host.sudo is not None)
        match self._parsed(session.ask(json.dumps(encode((order, *arguments))).encode(), timeout=seconds)):
            case ("done", value):
                return value
            case ("failed", str(text), int(number)):
                fix = _FIXES.get(number, "mend that on the node, then try again")
                raise FailedError(f"{self.name}: {_printable(text)}", fix)
            case other:
                raise self._nonsense(other)

    def _parsed(self, line: bytes) -> Any:
        try:
            return decode(json.loads(line))
        except (ValueError, TypeError) as error:
            raise self._nonsense(error) from None

    def _nonsense(self, what: object) -> FailedError:
        return FailedError(
            f"{self.name}: an answer that makes no sense: {_printable(str(what))[:80]}",
            "log in there and look at its Python",
        )

    def look(self, changes: Sequence[Change]) -> Look:
        """What is there for each change; root is asked only about what the user may not read."""
        states, books = self._look(changes, root=False)
        hidden = [number for number, state in enumerate(states) if not state.known and not state.done]
        if hidden and self._host.sudo is not None:
            seen, _ = self._look([changes[number] for number in hidden], root=True)
            for number, state in zip(hidden, seen, strict=True):
                states[number] = state
        assert self._home is not None  # every session tells it
        return Look(tuple(map(Planned, changes, states)), books, self._home)

    def _look(self, changes: Sequence[Change], *, root: bool) -> tuple[list[State], Books]:
        match self.ask("look", tuple(changes), root=root):
            case (tuple(states), Books() as books) if [type(state) for state in states] == [State] * len(changes):
                return list(states), books
            case other:
                raise self._nonsense(other)

    def books(self) -> Books:
        """What the host's journal holds."""
        return self._look((), root=False)[1]

    def lock(self) -> None:
        """Take the host's lock until this is closed.

        Raises:
            RefusedError: somebody else has it.
        """
        match self.ask("lock", signature()):
            case None:
                return
            case Holder(by, origin, since):
                who = _printable(f"{by} from {origin}" if origin else by)
                raise RefusedError(
                    f"{self.name}: {who} is changing it since {_printable(since) or 'just now'}",
                    "wait until that is done; its lock goes with it, however it ends",
                )
            case other:
                raise self._nonsense(other)

    def apply(self, plan: Planned) -> None:
        """Make a change, journaled before it is made."""
        change = plan.change
        self.ask("apply", change, plan.state, root=change.root, seconds=_seconds(change))

    def undo(self, run: str | None, *, force: bool, tell: Tell) -> Outcome:
        """Undo the entries of a run, or all, newest first, and end the run that was under way if nothing failed."""
        outcome = Outcome(self.name)
        try:
            books = self.books()
            for entry in reversed(books.entries):
                if run is None or (isinstance(entry, Entry) and entry.run == run):
                    outcome = self._undo(entry, outcome, force, tell)
            if books.unfinished is not None and not outcome.failed:
                self.ask("commit")
        except SparkctlError as error:
            outcome = replace(outcome, error=error)
        return outcome

    def _undo(self, entry: Entry | Damaged, outcome: Outcome, force: bool, tell: Tell) -> Outcome:
        if isinstance(entry, Damaged):
            damaged = Leftover(self.name, f"entry {entry.number} of the journal", entry.reason)
            return replace(outcome, failed=(*outcome.failed, damaged))
        title = entry.change.title
        tell(self.name, f"undo: {title}")
        try:
            undone = self.ask("undo", entry.number, force, root=entry.root, seconds=_seconds(entry.change))
            if not isinstance(undone, Undone):
                raise self._nonsense(undone)
        except FailedError as error:
            if self.lost:
                raise
            return replace(outcome, failed=(*outcome.failed, Leftover(self.name, title, error.message)))
        if undone.done:
            return replace(outcome, undone=(*outcome.undone, title))
        changed = tuple(diff(undone.ours, undone.now))
        return replace(outcome, left=(*outcome.left, Leftover(self.name, title, undone.reason, changed)))

    def _session(self, *, root: bool) -> Session:
        if root in self._sessions:
            return self._sessions[root]
        if root and self._home is None:
            self._session(root=False)  # which knows whose journal it is
        folders = (self._home.user, self._home.sparkctl) if root and self._home else (None, None)
        transport = self._host.transport
        session = transport.session(shipped.argv(transport.python), sudo=self._host.sudo if root else None)
        self._sessions[root] = session
        first = shipped.modules(MODULES) + json.dumps(folders).encode()
        match self._parsed(session.ask(first, timeout=_ORDER_SECONDS)):
            case ("done", (str(user), str(ours))):
                self._home = Home(user, ours)
            case other:
                raise self._nonsense(other)
        if len(self._sessions) == 1:
            threading.Thread(target=self._nudge, args=(self._done,), daemon=True).start()
        return session

    def _nudge(self, done: threading.Event) -> None:
        while not done.wait(NUDGE):
            for session in list(self._sessions.values()):
                session.nudge()

    def close(self) -> None:
        """End the sessions, and with them the lock. The next order opens them anew."""
        self._done.set()
        self._done = threading.Event()
        for root in sorted(self._sessions, reverse=True):  # the user's last, since it holds the lock
            self._sessions.pop(root).close()


_FIXES = {
    errno.ENOSPC: "free some space there, then try again",
    errno.EDQUOT: "free some space there, then try again",
    errno.EACCES: "let the user who logs in use sudo there",
    errno.EPERM: "let the user who logs in use sudo there",
    errno.EROFS: "the file system is read-only: mend it, then try again",
}


def _seconds(change: Change) -> float:
    """How long making or undoing it may take: a command may be preceded and followed by its check."""
    if isinstance(change, CommandChange | MakeChange):
        return _ORDER_SECONDS + 3 * change.timeout
    reload = change.reload if isinstance(change, FileChange | LinesChange) else ()
    return _ORDER_SECONDS * (1 + len(reload))


def _printable(text: str) -> str:
    """What a host says must not play with the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def signature() -> str:
    """Who we are, for whoever finds the lock taken."""
    return f"{getpass.getuser()}@{socket.gethostname()}"
