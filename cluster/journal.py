"""The journal of a host: each change is written down, with what it replaces, before it is made.

Sent to the node: see cluster.changes.

$SPARKCTL_HOME/journal (0700) holds
    0001.json    an Entry
    0001.before  the bytes that its change replaced, if there were any
    unfinished   the Run under way; what one that died has left is undone by the next `up` or `down`
    lock         held (flock) by the session that may change this host; in it, its Holder
    reserve      a little space, given up when something is undone, so that a full disk does not prevent it
What root changes is root's entry and root's backup, and root undoes no other: being the user is not enough to make root write.

`main` answers orders, one line of JSON each, until its input ends or falls silent: ["name", argument...] gives ["done", value] or
["failed", text, errno], as cluster.changes.encode writes them. The lock goes with this program, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.acts import (
    HostError,
    Place,
    digest,
    look,
    make,
    missing_folders,
    paths,
    read,
    refuse,
    rehearse,
    sync,
    undo,
    write,
)
from cluster.changes import (
    Books,
    Change,
    Damaged,
    Entry,
    FileChange,
    Holder,
    LinesChange,
    Run,
    State,
    TreeChange,
    Undone,
    decode,
    encode,
)

SILENCE = 30  # seconds without a line from whoever gives the orders, after which they count as gone
RESERVE = 1 << 20  # bytes
MARK = "\x1e"


class Journal:
    """The journal in one $SPARKCTL_HOME. Its methods raise HostError and OSError."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._folder = place.sparkctl / "journal"
        self._lock: int | None = None

    def look(self, changes: tuple[Change, ...]) -> tuple[tuple[State, ...], Books]:
        """What is there for each change, and what the journal holds. Changes nothing."""
        books = self.books()
        return tuple(self._look(change, books) for change in changes), books

    def _look(self, change: Change, books: Books) -> State:
        state = look(change, self._place)
        if state.known or not isinstance(change, FileChange):
            return state
        # Only root may read it, but anybody that it has not been touched since root wrote it.
        path = self._place.path(change.path)
        for entry in reversed(books.entries):
            if isinstance(entry, Entry) and entry.root and entry.paths == (str(path),):
                now = path.stat()
                as_left = (now.st_mtime_ns, now.st_size, now.st_mode & 0o7777) == (
                    entry.mtime,
                    len(change.content),
                    change.mode,
                )
                return dataclasses.replace(state, done=as_left and entry.left == (digest(change.content),))
        return state

    def books(self) -> Books:
        """Its entries and its unfinished run."""
        numbers = sorted(int(path.stem) for path in self._folder.glob("[0-9]*.json"))
        return Books(tuple(self._listed(number) for number in numbers), self._unfinished())

    def _listed(self, number: int) -> Entry | Damaged:
        try:
            return self._entry(number)
        except (OSError, HostError) as error:
            return Damaged(number, str(error))

    def _entry(self, number: int) -> Entry:
        entry, owner = self._parsed(self._file(number))
        if not isinstance(entry, Entry) or entry.number != number:
            raise HostError(f"{self._file(number)}: no entry of a journal")
        if entry.root and owner != 0:
            raise HostError(f"{self._file(number)}: says that it is root's, and is not")
        return entry

    def _unfinished(self) -> Run | None:
        path = self._folder / "unfinished"
        if not path.exists():
            return None
        run: Run = self._parsed(path)[0]
        return run

    def _parsed(self, path: Path) -> tuple[Any, int]:
        """What a file of the journal holds, and the user that it belongs to."""
        with path.open("rb") as file:
            try:
                return decode(json.loads(file.read())), os.fstat(file.fileno()).st_uid
            except (ValueError, TypeError) as error:
                raise HostError(f"{path}: damaged, or another version's ({error})") from None

    def lock(self, by: str) -> Holder | None:
        """Take the lock, for as long as this program runs. None: done; else who has it."""
        self._place.sparkctl.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if self._folder.is_symlink():
            raise HostError(f"{self._folder}: is a link")
        lock = os.open(str(self._folder / "lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(HostError, OSError):
                holder, _ = self._parsed(self._folder / "lock")
                if isinstance(holder, Holder):
                    return holder
            return Holder("somebody", "", "")  # who has not written it down yet
        origin = os.environ.get("SSH_CONNECTION", "").partition(" ")[0]
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(encode(Holder(by, origin, now()))).encode(), 0)
        self._lock = lock
        self._sweep()
        return None

    def _sweep(self) -> None:
        """Remove what a power cut has left that no entry refers to."""
        for path in (*self._folder.glob(".*"), *self._folder.glob("[0-9]*.before")):
            if path.suffix != ".before" or not path.with_suffix(".json").exists():
                path.unlink()

    def begin(self, run: str, by: str) -> None:
        """Begin a run: from now until `commit`, what is applied will be undone if we do not come back."""
        reserve = os.open(str(self._folder / "reserve"), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(reserve, 0, RESERVE)
        except OSError:
            self._release_reserve()
            raise
        finally:
            os.close(reserve)
        self._write(self._folder / "unfinished", json.dumps(encode(Run(run, by, now()))).encode())

    def apply(self, change: Change, expected: State) -> Entry | None:
        """Make a change, if what is there is what it was planned on. None: there was nothing left to do."""
        run = self._unfinished()
        if run is None:
            raise HostError("no run has begun")
        state = look(change, self._place)
        if state.done:
            return None
        if not state.same(expected):
            raise HostError(f"{change.title}: what is there has changed since this was planned")
        refuse(change, state)
        rehearse(change, self._place)
        entry = self._entry_for(change, state, run)
        self._keep(entry, state.content)
        made = make(change, entry, state.content, self._place)
        if made != entry:
            self._keep(made, None)
        return made

    def _entry_for(self, change: Change, state: State, run: Run) -> Entry:
        numbers = [int(path.stem) for path in self._folder.glob("[0-9]*.json")]
        targets = paths(change, self._place)
        lean = dataclasses.replace(change, archive=b"") if isinstance(change, TreeChange) else change
        whole = change.wanted(state.content) if isinstance(change, (FileChange, LinesChange)) else None
        return Entry(
            number=max(numbers, default=0) + 1,
            run=run.id,
            by=run.by,
            when=now(),
            root=os.geteuid() == 0,
            change=lean,
            before=dataclasses.replace(state, content=None),
            paths=tuple(map(str, targets)),
            folders=tuple(dict.fromkeys(folder for path in targets for folder in missing_folders(path))),
            left=(digest(whole),) if whole is not None else (),
            mtime=time.time_ns(),
        )

    def _keep(self, entry: Entry, before: bytes | None) -> None:
        if before is not None:
            self._write(self._file(entry.number).with_suffix(".before"), before)
        # Anybody may read the entries of root's (the folder is the user's alone), but not what their changes replaced.
        self._write(self._file(entry.number), json.dumps(encode(entry)).encode(), mode=0o644 if entry.root else 0o600)

    def undo(self, number: int, force: bool) -> Undone:
        """Undo one entry and strike it out. What is left alone stays in the journal."""
        self._release_reserve()
        entry = self._entry(number)
        if entry.root and os.geteuid() != 0:
            raise HostError(f"{entry.change.title}: only root can undo it")
        if not entry.root and os.geteuid() == 0 and self._folder.stat().st_uid != 0:
            raise HostError(f"{entry.change.title}: not root's to undo")
        backup = self._file(number).with_suffix(".before")
        before = read(backup)
        if before is not None and entry.root and backup.stat().st_uid != 0:
            raise HostError(f"{backup}: says that it is root's, and is not")
        undone = undo(entry, before, self._place, force=force)
        if undone.done:
            self._strike_out(number)
        return undone

    def _strike_out(self, number: int) -> None:
        entry = self._file(number)
        entry.unlink()
        sync(self._folder)
        with contextlib.suppress(FileNotFoundError):
            entry.with_suffix(".before").unlink()

    def commit(self) -> None:
        """End the run: all of it has been undone, or stays until `down`. What it made in $SPARKCTL_HOME stays for good."""
        self._release_reserve()
        for entry in self.books().entries:
            ours = [self._place.sparkctl in Path(path).parents for path in getattr(entry, "paths", ())]
            if ours and all(ours):
                self._strike_out(entry.number)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "unfinished").unlink()
            sync(self._folder)

    def _release_reserve(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "reserve").unlink()

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:04}.json"

    def _write(self, path: Path, content: bytes, *, mode: int = 0o600) -> None:
        like = State(True, mode=mode, uid=os.geteuid(), gid=os.getegid(), mtime=time.time_ns())
        write(path, path.with_name(f".{path.name}"), content, like)


def now() -> str:
    """The host's clock, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def main() -> None:
    """Answer orders. The first line names the folders: [home, sparkctl], or nothing of them for the user's own."""
    lines = _lines()
    home, ours = json.loads(next(lines))
    user = Path(home) if home else Path.home()
    place = Place(user, user / Path(ours or os.environ.get("SPARKCTL_HOME") or ".sparkctl").expanduser())
    journal = Journal(place)
    _answer("done", (str(place.home), str(place.sparkctl)))
    orders: dict[str, Callable[..., Any]] = {
        name: getattr(journal, name) for name in ("look", "lock", "begin", "apply", "undo", "commit")
    }
    for line in lines:
        try:
            name, *arguments = decode(json.loads(line))
            _answer("done", orders[name](*arguments))
        except HostError as error:
            _answer("failed", str(error), 0)
        except OSError as error:
            _answer(
                "failed", ": ".join(filter(None, (str(error.filename or ""), error.strerror))), error.errno or errno.EIO
            )
        except Exception as error:  # whatever it is, whoever gave the order must learn of it
            _answer("failed", f"{type(error).__name__}: {error}", 0)


def _lines() -> Iterator[bytes]:
    while True:
        signal.alarm(SILENCE)  # its signal ends this program, and so gives up the lock
        line = sys.stdin.buffer.readline()
        signal.alarm(0)
        if not line:
            return
        if line.strip():
            yield line


def _answer(*words: Any) -> None:
    sys.stdout.buffer.write((MARK + json.dumps(encode(words)) + "\n").encode())
    sys.stdout.buffer.flush()
