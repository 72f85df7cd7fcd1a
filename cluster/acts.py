"""The acts of a change on its host: look at what is there, make it, undo it. Sent to the node: see cluster.changes.

Undoing puts back bytes, mode, owner and time of modification. It is safe to repeat, and to do for a change that was written down
and never made, or made by half. A file that somebody else has changed since is left alone unless forced; of the lines that we
added to a shared file only those are removed then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import pwd
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.changes import (
    Change,
    CommandChange,
    Entry,
    FileChange,
    LinesChange,
    MakeChange,
    SettingChange,
    State,
    TreeChange,
    Undone,
)

MOST_CONTENT = 2 << 20  # bytes of a file that we change: an answer must not become too long


class HostError(Exception):
    """It cannot be done on this host; the text says what and why."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The folders that `~/` and `$SPARKCTL_HOME/` stand for."""

    home: Path
    sparkctl: Path

    def word(self, word: str) -> str:
        """A word of a command, expanded."""
        for prefix, folder in (("~/", self.home), ("$SPARKCTL_HOME/", self.sparkctl)):
            if word.startswith(prefix):
                return str(folder / word[len(prefix) :])
        return word

    def path(self, name: str) -> Path:
        """A path, expanded, and links followed: a link stays a link, what it leads to is changed."""
        path = Path(self.word(name))
        if not path.is_absolute():
            raise HostError(f"{name}: not an absolute path")
        return Path(os.path.realpath(str(path)))

    def run(self, argv: tuple[str, ...], timeout: float = 60.0) -> tuple[int, str]:
        """A command's exit status and what it printed, in English; at `timeout` seconds it and its children are ended."""
        words = [self.word(word) for word in argv]
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,
            )
        except OSError as error:
            raise HostError(f"{words[0]}: {error.strerror}") from None
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise HostError(f"`{' '.join(words)}`: not done after {timeout:g} s") from None
        return process.returncode, printed.decode(errors="replace")

    def run_well(self, argv: tuple[str, ...], timeout: float = 60.0) -> None:
        """Run a command that must succeed."""
        status, printed = self.run(argv, timeout)
        if status:
            last = (printed.strip().splitlines() or [""])[-1][:200]
            raise HostError(f"`{' '.join(argv)}`: exit status {status}{last and ': ' + last}")


def look(change: Change, place: Place) -> State:
    """What is there. Changes nothing. Like the other acts it raises HostError and OSError."""
    if isinstance(change, (FileChange, LinesChange)):
        return _look_at_file(change, place.path(change.path))
    if isinstance(change, SettingChange):
        content = read(place.path(change.path))
        return State(content is not None and content.decode().strip() == change.value, content)
    if isinstance(change, CommandChange):
        status, printed = place.run(change.check, change.timeout)
        return State(status == 0 and printed.strip() == change.done, printed.encode())
    there = [str(path) for path in paths(change, place) if path.exists()]
    return State(len(there) == len(paths(change, place)), "\n".join(there).encode() or None)


def refuse(change: Change, state: State) -> None:
    """Raise HostError for what could not be undone, before it is even written down."""
    there = state.content is not None
    if isinstance(change, (MakeChange, TreeChange)) and there:  # undoing would remove what is not ours
        raise HostError(f"{(state.content or b'').decode().splitlines()[0]}: is there already")
    if isinstance(change, SettingChange) and not there:
        raise HostError(f"{change.path}: there is no such setting here")
    if isinstance(change, (FileChange, LinesChange)) and there and os.geteuid() not in (0, state.uid):
        raise HostError(f"{change.path}: belongs to another user")


def rehearse(change: Change, place: Place) -> None:
    """Have a file judged by its own program before it is written, in a folder that only we read and that is gone afterwards."""
    if not isinstance(change, FileChange) or not change.trial:
        return
    path = place.path(change.path)
    with tempfile.TemporaryDirectory(dir="/run" if os.geteuid() == 0 else None) as root:  # a reboot empties /run
        folder = Path(root, *path.parent.parts[1:])
        folder.mkdir(parents=True)
        for other in path.parent.glob(f"*{path.suffix}"):
            if other.is_file():
                shutil.copyfile(str(other), str(folder / other.name))
                (folder / other.name).chmod(0o600)
        (folder / path.name).write_bytes(change.content)
        (folder / path.name).chmod(0o600)
        argv = tuple(word.replace("{root}", root) for word in change.trial)
        status, printed = place.run(argv)
        if status:
            said = " ".join(printed.replace(root, "").split())[-300:]
            raise HostError(f"{change.path} is not written: `{' '.join(change.trial)}` says: {said or status}")


def paths(change: Change, place: Place) -> list[Path]:
    """What it writes or makes."""
    if isinstance(change, CommandChange):
        return []
    return [place.path(path) for path in (change.paths if isinstance(change, MakeChange) else (change.path,))]


def make(change: Change, entry: Entry, before: bytes | None, place: Place) -> Entry:
    """Make a change that has been written down as `entry`. Returns the entry, with what is only known now."""
    if isinstance(change, SettingChange):
        _set(Path(entry.paths[0]), change.value.encode())
        return entry
    if isinstance(change, CommandChange):
        place.run_well(change.do, change.timeout)
        if not look(change, place).done:
            raise HostError(f"`{' '.join(change.do)}` had no effect, says `{' '.join(change.check)}`")
        return entry
    if isinstance(change, (FileChange, LinesChange)):
        _make_folders(entry)
        _write_file(change, entry, before)
        for argv in change.reload:
            place.run_well(argv)
        return entry
    _make_folders(entry)
    if isinstance(change, TreeChange):
        _unpack(change.archive, Path(entry.paths[0]), beside(Path(entry.paths[0]), entry))
        return entry
    place.run_well(change.argv, change.timeout)
    return dataclasses.replace(entry, left=tuple(_left(Path(path), change) for path in entry.paths))


def undo(entry: Entry, before: bytes | None, place: Place, *, force: bool) -> Undone:
    """Put back what was there `before`."""
    change = entry.change
    if isinstance(change, (FileChange, LinesChange)):
        left = _put_back(change, entry, before, force)
        if left is None:
            forgiven = (HostError,) if force else ()  # what fails each time must not be tried for ever
            for argv in change.reload:  # each time: the last attempt may have ended between the file and this
                with contextlib.suppress(*forgiven):
                    place.run_well(argv)
        return left or Undone(True)
    if isinstance(change, SettingChange):
        return _reset(change, Path(entry.paths[0]), before, force)
    if isinstance(change, CommandChange):
        if change.undo and look(change, place).done:
            place.run_well(change.undo, change.timeout)
            if look(change, place).done:
                raise HostError(f"`{' '.join(change.undo)}` had no effect, says `{' '.join(change.check)}`")
        return Undone(True)
    return _remove(entry, force)


def _look_at_file(change: FileChange | LinesChange, path: Path) -> State:
    try:
        content = read(path)
        if content is None:
            return State(False)
        now = path.stat()
    except PermissionError:
        return State(False, known=False)
    mode = now.st_mode & 0o7777
    done = content == change.wanted(content)
    if isinstance(change, FileChange):
        done = done and mode == change.mode and (change.owner is None or now.st_uid == _user(change.owner).pw_uid)
    return State(done, content, mode=mode, uid=now.st_uid, gid=now.st_gid, mtime=now.st_mtime_ns)


def _write_file(change: FileChange | LinesChange, entry: Entry, before: bytes | None) -> None:
    there = entry.before
    mode = there.mode if before is not None and isinstance(change, LinesChange) else change.mode
    uid, gid = (there.uid, there.gid) if before is not None else (os.geteuid(), os.getegid())
    if entry.root and isinstance(change, FileChange) and change.owner is not None:
        uid, gid = _user(change.owner).pw_uid, _user(change.owner).pw_gid
    path = Path(entry.paths[0])
    like = State(True, mode=mode, uid=uid, gid=gid, mtime=entry.mtime)
    write(path, beside(path, entry), change.wanted(before), like)


def _user(name: str) -> Any:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise HostError(f"no user {name} here") from None


def _put_back(change: FileChange | LinesChange, entry: Entry, before: bytes | None, force: bool) -> Undone | None:
    """None: it is as it was; else why it was left alone."""
    path = Path(entry.paths[0])
    aside = beside(path, entry)
    _unlink(aside)
    state = _look_at_file(change, path)
    now = state.content
    if not state.known:
        raise HostError(f"{path}: may not be read by this user")
    remainder = None if now is None else change.remainder(now, before, force=force)
    attributes = [(at.mode, at.uid, at.gid) for at in (state, entry.before)]
    gone = isinstance(change, LinesChange) and not change.block(now or b"")
    if now == before and (now is None or attributes[0] == attributes[1]):
        pass
    elif now == before or digest(now) == entry.left[0] or (force and remainder is None and not gone):
        if before is None:
            _unlink(path)
            sync(path.parent)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, aside, before, entry.before)
    elif remainder is not None:
        write(path, aside, remainder, state)
    elif not gone:  # our lines were removed by somebody: nothing is left to do
        reason = "has been removed since" if now is None else "has been changed since"
        return Undone(False, f"{path} {reason}", change.wanted(before), now)
    _remove_folders(entry)
    return None


def _set(path: Path, value: bytes) -> None:
    path.write_bytes(value)
    now = path.read_bytes().strip()
    if now != value.strip():
        raise HostError(f"{path}: is {now.decode()} after {value.decode().strip()} was written to it")


def _reset(change: SettingChange, path: Path, before: bytes | None, force: bool) -> Undone:
    now = read(path)
    if now is None or before is None or now == before:  # the device is gone, or the host was booted since
        return Undone(True)
    if now.decode().strip() != change.value and not force:
        return Undone(False, f"{path} has been changed since", change.value.encode(), now)
    _set(path, before)
    return Undone(True)


def _left(path: Path, change: MakeChange) -> str:
    if not path.exists():
        raise HostError(f"`{' '.join(change.argv)}` did not make {path}")
    return _digest_of(path)


def _digest_of(path: Path) -> str:
    """Of a file small enough to be somebody's work: a key, a configuration."""
    return digest(read(path)) if path.is_file() and path.stat().st_size <= MOST_CONTENT else ""


def _remove(entry: Entry, force: bool) -> Undone:
    made = [Path(path) for path in entry.paths]
    for path, left in zip(made, entry.left):  # noqa: B905 - Python 3.8 has no `strict`
        if left and path.exists() and _digest_of(path) != left and not force:
            return Undone(False, f"{path} has been changed since")
    for path in [*made, *(beside(path, entry) for path in made)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(str(path))
        else:
            _unlink(path)
    _remove_folders(entry)
    return Undone(True)


def _unpack(archive: bytes, path: Path, aside: Path) -> None:
    aside.mkdir(mode=0o700)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            target = aside / member.name
            if (
                aside not in (target, *target.parents)
                or ".." in target.parts
                or not (member.isfile() or member.isdir())
            ):
                raise HostError(f"{member.name}: has no place in the archive")
            (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            if content is not None:
                with target.open("xb") as file:
                    shutil.copyfileobj(content, file)
                    os.fchmod(file.fileno(), 0o755 if member.mode & 0o100 else 0o644)
                    file.flush()
                    os.fsync(file.fileno())
    aside.replace(path)
    sync(path.parent)


def _make_folders(entry: Entry) -> None:
    for folder in map(Path, entry.folders):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            folder.chmod(0o755 if entry.root else 0o700)
            sync(folder.parent)


def _remove_folders(entry: Entry) -> None:
    for folder in reversed(entry.folders):
        with contextlib.suppress(OSError):  # gone already, or somebody else has put something in
            Path(folder).rmdir()


def missing_folders(path: Path) -> Iterator[str]:
    """The folders above `path` that are not there, outermost first."""
    if not path.parent.exists():
        yield from missing_folders(path.parent)
        yield str(path.parent)


def beside(path: Path, entry: Entry) -> Path:
    """A name beside `path` that only this entry uses, and that no program takes for a file of its own."""
    return path.with_name(f".{path.name}.sparkctl-{entry.number:04}")


def digest(content: bytes | None) -> str:
    """SHA-256 in hexadecimal; of nothing, nothing."""
    return "" if content is None else hashlib.sha256(content).hexdigest()


def read(path: Path) -> bytes | None:
    """A file's bytes; None if it is not there."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_CONTENT + 1)
    except FileNotFoundError:
        return None
    if len(content) > MOST_CONTENT:
        raise HostError(f"{path}: larger than {MOST_CONTENT >> 20} MiB")
    return content


def write(path: Path, aside: Path, content: bytes, like: State) -> None:
    """Replace a file in one step by one with the mode, owner and time of `like`. `aside`, in the same folder, is ours to use."""
    _unlink(aside)
    descriptor = os.open(str(aside), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if (like.uid, like.gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), like.uid, like.gid)
            os.fchmod(file.fileno(), like.mode)
            os.utime(file.fileno(), ns=(like.mtime, like.mtime))
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        _unlink(aside)
        raise
    sync(path.parent)


def sync(folder: Path) -> None:
    """Have the names in a folder survive a power cut."""
    descriptor = os.open(str(folder), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
