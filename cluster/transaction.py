"""Changes to the hosts of a pair, as one: all of them are made, or none stays made. And their undoing.

On each host its journal (cluster.journal) does the work, in a session that holds the host's lock and ends with this program; root's
part in a second session, under sudo. If this program, a host or the network dies on the way, the next `up` or `down` undoes what is
left of the run, because a transaction begins with that.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from cluster.changes import Books, Change, Planned
from cluster.clerk import Clerk, Host, Leftover, Look, Outcome, Tell, signature
from cluster.errors import FailedError, RefusedError, SparkctlError

__all__ = ["Host", "Leftover", "Look", "Outcome", "Transaction", "look", "undo"]

T = TypeVar("T")

_REGAIN_SECONDS = 3.0


def look(host: Host, changes: Sequence[Change]) -> Look:
    """What is there for each change. Takes no lock and changes nothing. Root is asked only about what the user may not read.

    Raises:
        FailedError: the host cannot be reached or looked at.
    """
    clerk = Clerk(host)
    try:
        return clerk.look(changes)
    finally:
        clerk.close()


def undo(hosts: Sequence[Host], *, force: bool = False, tell: Tell = lambda node, said: None) -> tuple[Outcome, ...]:
    """Undo all that the journals of the hosts hold, newest first: `down`. Safe to repeat after it was interrupted.

    A host that cannot be reached does not keep the others from being undone.

    Args:
        force: put back also what somebody else has changed since.
        tell: called with a node's name and what is being done there.

    Raises:
        RefusedError: somebody else is changing one of the hosts; nothing was undone.
    """
    clerks = [Clerk(host) for host in hosts]

    def locked(clerk: Clerk) -> SparkctlError | None:
        try:
            if clerk.books() != Books():
                clerk.lock()
        except FailedError as error:
            return error
        return None

    def undone(pair: tuple[Clerk, SparkctlError | None]) -> Outcome:
        clerk, error = pair
        if error is not None:
            return Outcome(clerk.name, error=error)
        return clerk.undo(None, force=force, tell=tell)

    try:
        return tuple(_each(zip(clerks, _each(clerks, locked), strict=True), undone))
    finally:
        for clerk in clerks:
            clerk.close()


class Transaction:
    """The right to change the hosts: a context manager that holds their locks. Left without `commit`, it undoes what it did.

    Entering undoes first what a run that died has left; `recovered` names the hosts where there was something.

    Raises, on entering:
        RefusedError: another run holds the lock of a host; it says who, from where and since when.
        FailedError: a host cannot be reached, or what was left there cannot be undone.
    """

    def __init__(self, hosts: Sequence[Host], *, tell: Tell = lambda node, said: None) -> None:
        self.recovered: tuple[str, ...] = ()
        self._tell = tell
        self._run = secrets.token_hex(8)
        self._clerks = {host.name: Clerk(host) for host in hosts}
        self._begun: set[str] = set()
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        try:
            _each(self._clerks.values(), Clerk.lock)
            self.recovered = tuple(name for name in _each(self._clerks.values(), self._recover) if name)
        except BaseException:
            self._close()
            raise
        return self

    def look(self, node: str, changes: Sequence[Change]) -> Look:
        """See `look`; in this transaction's session."""
        return self._clerks[node].look(changes)

    def apply(self, planned: Mapping[str, Sequence[Planned]]) -> None:
        """Make changes: on each host in their order, on all hosts at once. Those that are done already are passed over.

        Raises:
            FailedError: one could not be made, or what it was planned on has changed since. Leaving this undoes them all.
        """
        self._stop.clear()
        _each(planned, lambda name: self._apply(name, planned[name]), stop=self._stop)

    def _apply(self, name: str, planned: Sequence[Planned]) -> None:
        clerk = self._clerks[name]
        try:
            for plan in planned:
                if plan.done or self._stop.is_set():
                    continue
                if name not in self._begun:
                    self._begun.add(name)
                    clerk.ask("begin", self._run, signature())
                self._tell(name, plan.change.title)
                clerk.apply(plan)
        except BaseException:
            self._stop.set()  # it will all be undone: the other host need not go on
            raise

    def commit(self) -> None:
        """Keep what was done. From here on only `undo` undoes it."""
        _each(list(self._begun), lambda name: self._clerks[name].ask("commit"))
        self._begun.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            outcomes = _each(list(self._begun), self._roll_back)
        finally:
            self._close()
        failed = [outcome for outcome in outcomes if not outcome.complete]
        if failed and not isinstance(error, SparkctlError):
            raise FailedError("not all that this run had changed is undone", _not_undone(failed)) from error
        if isinstance(error, SparkctlError) and failed:
            error.fix = _not_undone(failed)
        elif isinstance(error, SparkctlError) and any(outcome.undone for outcome in outcomes):
            error.fix += " (what this run had changed is undone)"

    def _roll_back(self, name: str) -> Outcome:
        clerk = self._clerks[name]
        try:
            if clerk.lost:  # whoever has taken its lock since has undone our run
                clerk.close()
                _regain(clerk)
            return clerk.undo(self._run, force=False, tell=self._tell)
        except SparkctlError as error:
            return Outcome(name, error=error)

    def _recover(self, clerk: Clerk) -> str:
        """Undo what is left of a run that died; the host's name if there was one."""
        died = clerk.books().unfinished
        if died is None:
            return ""
        self._tell(clerk.name, f"undo what the run of {died.by} at {died.since} has left unfinished")
        outcome = clerk.undo(died.id, force=False, tell=self._tell)
        if outcome.failed or outcome.error:
            raise FailedError(
                f"{clerk.name}: a run of {died.by} was interrupted at {died.since} and cannot be undone",
                _not_undone([outcome]),
            )
        return clerk.name

    def _close(self) -> None:
        for clerk in self._clerks.values():
            clerk.close()


def _regain(clerk: Clerk) -> None:
    """Take a lock again that a lost session of ours may still hold for a moment."""
    deadline = time.monotonic() + _REGAIN_SECONDS
    while True:
        try:
            return clerk.lock()
        except RefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _each(items: Iterable[Any], act: Callable[[Any], T], *, stop: threading.Event | None = None) -> list[T]:
    """Do it for all hosts at once. Raises what one of them raised, when all have ended; `stop` is set before, for them to see."""
    each = list(items)
    with ThreadPoolExecutor(max_workers=max(1, len(each))) as pool:
        futures = [pool.submit(act, item) for item in each]
        try:
            return [future.result() for future in futures]
        except BaseException:
            if stop is not None:
                stop.set()
            raise


def _not_undone(outcomes: Sequence[Outcome]) -> str:
    said = []
    for outcome in outcomes:
        said += [f"{item.node}: {item.title}: {item.reason}" for item in (*outcome.left, *outcome.failed)]
        said += [outcome.error.message] if outcome.error else []
    return f"not undone: {'; '.join(said)}; `sparkctl down` tries again"
