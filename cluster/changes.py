"""Changes to a host, as data: what each wants, how it is shown to a person, how the journal writes it down. Pure.

A kind of change has three acts on the host, in cluster.acts: look, make, undo. cluster.journal keeps the books there, and
cluster.transaction has it done on both nodes or on none. The three files up to the journal are sent to the node and run by its
Python, so: standard library only, nothing but each other imported, any Python from 3.8.

Paths, and words of commands, may begin with `~/` or `$SPARKCTL_HOME/`, which the host knows; else they are absolute. `root` says
that root makes the change.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
import re
import shlex
from dataclasses import dataclass, field
from typing import Any, Union


@dataclass(frozen=True)
class FileChange:
    """A whole file; then the commands of `reload`, which run again when the file is put back.

    `owner` is a user's name and counts for root's files: None keeps the owner of a file that is there, and is root for a new one.
    `trial` is a command that must succeed before anything is written: below the folder that `{root}` in it stands for lies a copy
    of the files beside this one, with this one as it would be.
    """

    path: str
    content: bytes
    mode: int = 0o644
    owner: str | None = None
    root: bool = False
    reload: tuple[tuple[str, ...], ...] = ()
    trial: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What it does, in a line."""
        return _then(f"write {self.path} ({_attributes(self)})", self.reload)

    def wanted(self, now: bytes | None) -> bytes:
        """The whole content, given what is there."""
        return self.content

    def remainder(self, now: bytes, before: bytes | None, *, force: bool) -> bytes | None:
        """None: nothing in a whole file is ours alone."""
        return None


@dataclass(frozen=True)
class LinesChange:
    """Lines of ours in a file that others write too, between two comments (#) that carry `label`; then `reload`, as of a file.

    `mode` is for a file that is not there yet.
    """

    path: str
    lines: tuple[str, ...]
    label: str
    mode: int = 0o600
    root: bool = False
    reload: tuple[tuple[str, ...], ...] = ()

    @property
    def title(self) -> str:
        """What it does, in a line."""
        return _then(f"add {len(self.lines)} line{'s' * (len(self.lines) != 1)} to {self.path}", self.reload)

    def wanted(self, now: bytes | None) -> bytes:
        """The whole content, given what is there: our lines at the end, or where they were."""
        text = now or b""
        old = self.block(text)
        if old:
            return text.replace(old, self.ours, 1)
        return text + (b"\n" if text and not text.endswith(b"\n") else b"") + self.ours

    def remainder(self, now: bytes, before: bytes | None, *, force: bool) -> bytes | None:
        """What stays of a file that others have changed since: `now`, with our lines as they were `before`, if at all.

        None: they are not there as we left them; with `force`, not there at all.
        """
        there = self.block(now)
        if not there or (there != self.ours and not force):
            return None
        return now.replace(there, self.block(before or b""), 1)

    @property
    def ours(self) -> bytes:
        """The lines between their comments."""
        begin, end = self._comments
        return "".join(f"{line}\n" for line in (begin, *self.lines, end)).encode()

    def block(self, text: bytes) -> bytes:
        """What stands between our comments in `text`, with them; empty if they are not there."""
        begin, end = (re.escape(comment.encode()) for comment in self._comments)
        found = re.search(rb"^%b\n(?:.*\n)*?%b(?:\n|\Z)" % (begin, end), text, re.MULTILINE)
        return found[0] if found else b""

    @property
    def _comments(self) -> tuple[str, str]:
        return f"# sparkctl: begin {self.label}", f"# sparkctl: end {self.label}"


@dataclass(frozen=True)
class SettingChange:
    """A value in a file of the kernel's, below /sys or /proc: written in place, and forgotten at the next boot.

    `what` names it for a person: "MTU of enp1s0f0np0".
    """

    what: str
    path: str
    value: str
    root: bool = True

    @property
    def title(self) -> str:
        """What it does, in a line."""
        return f"set the {self.what} to {self.value}"


@dataclass(frozen=True)
class CommandChange:
    """A command that changes something (`do`), one that undoes it, and one that tells: it is done when `check` prints `done`.

    `title` says in a line what it does; `timeout` is in seconds.
    """

    title: str
    do: tuple[str, ...]
    undo: tuple[str, ...]
    check: tuple[str, ...]
    done: str
    root: bool = False
    timeout: float = 60.0


@dataclass(frozen=True)
class MakeChange:
    """A command that makes files or folders that were not there, all of `paths`. It is undone by removing them."""

    title: str
    paths: tuple[str, ...]
    argv: tuple[str, ...]
    root: bool = False
    timeout: float = 60.0


@dataclass(frozen=True)
class TreeChange:
    """A folder, unpacked from a tar archive in one step. Its name tells its content: one that is there is the right one."""

    path: str
    archive: bytes = field(repr=False)
    root: bool = False

    @property
    def title(self) -> str:
        """What it does, in a line."""
        return f"unpack {self.path}"


Change = Union[FileChange, LinesChange, SettingChange, CommandChange, MakeChange, TreeChange]  # noqa: UP007 - Python 3.8


@dataclass(frozen=True)
class State:
    """What is there now: a file, a setting's value, what a check printed. No `content`: nothing; not `known`: root's."""

    done: bool
    content: bytes | None = None
    known: bool = True
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime: int = 0

    def same(self, other: State) -> bool:
        """Whether the content is the same, as far as both are known."""
        return not (self.known and other.known) or self.content == other.content


@dataclass(frozen=True)
class Planned:
    """A change, and what was there when it was planned: made only if that has not changed since."""

    change: Change
    state: State

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state.done

    def describe(self) -> str:
        """For a person: a line that says what would be done, and below it what would be different, if that is text."""
        return "\n".join([self.change.title + (" (as root)" if self.change.root else ""), *self._difference()])

    def _difference(self) -> list[str]:
        change, now = self.change, self.state
        if self.done:
            return []
        if isinstance(change, SettingChange):
            return [f"-{(now.content or b'').decode(errors='replace').strip()}", f"+{change.value}"]
        if isinstance(change, (CommandChange, MakeChange)):
            return ["$ " + shlex.join(change.do if isinstance(change, CommandChange) else change.argv)]
        if isinstance(change, TreeChange):
            return []
        if not now.known:
            return ["(what is there now can only be read by root)"]
        modes = (
            [f"mode {now.mode:o} -> {change.mode:o}"]
            if isinstance(change, FileChange) and now.content is not None
            else []
        )
        return [*(modes if now.mode != change.mode else []), *diff(now.content, change.wanted(now.content))]


@dataclass(frozen=True)
class Holder:
    """Who holds a host's lock: the command line's user and machine, the address they came from, since when (UTC)."""

    by: str
    origin: str
    since: str


@dataclass(frozen=True)
class Run:
    """A run that has begun to change a host and has neither been completed nor undone."""

    id: str
    by: str
    since: str


@dataclass(frozen=True)
class Entry:
    """A line of the journal.

    Args:
        before: what was there; its content is kept in a file of its own.
        paths: what the change writes or makes, links followed.
        folders: the folders that it has to make for that, outermost first.
        left: SHA-256 of each file that it leaves; empty where that is not known.
        mtime: the time of modification, in ns, that a file is given.
    """

    number: int
    run: str
    by: str
    when: str
    root: bool
    change: Change
    before: State
    paths: tuple[str, ...]
    folders: tuple[str, ...]
    left: tuple[str, ...]
    mtime: int


@dataclass(frozen=True)
class Damaged:
    """An entry of the journal that makes no sense."""

    number: int
    reason: str
    root: bool = False


@dataclass(frozen=True)
class Books:
    """What the journal of a host holds: its entries, oldest first, and the run that was not completed, if there is one."""

    entries: tuple[Entry | Damaged, ...] = ()
    unfinished: Run | None = None


@dataclass(frozen=True)
class Undone:
    """What undoing came to. Not `done`: left alone for `reason`; `ours` and `now` are the bytes that we left and those there."""

    done: bool
    reason: str = ""
    ours: bytes | None = None
    now: bytes | None = None


def diff(before: bytes | None, after: bytes | None) -> list[str]:
    """The lines of a unified diff, without its header. Of what is no text, the sizes."""
    try:
        old, new = ((text or b"").decode().splitlines() for text in (before, after))
    except UnicodeDecodeError:
        return [f"{len(before or b'')} bytes -> {len(after or b'')} bytes"]
    return [line.rstrip("\n") for line in difflib.unified_diff(old, new, lineterm="")][2:]


_TYPES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        *(FileChange, LinesChange, SettingChange, CommandChange, MakeChange, TreeChange),
        *(State, Holder, Run, Entry, Damaged, Books, Undone),
    )
}


def encode(value: Any) -> Any:
    """Our types as JSON has them: a dataclass names its type, bytes become base64."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(value: Any) -> Any:
    """What `encode` was given; sequences come back as tuples.

    Raises:
        ValueError, TypeError: it is nothing that this version's `encode` makes.
    """
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "base64" in value:
        return base64.b64decode(value["base64"], validate=True)
    kind = _TYPES.get(value.get("type", ""))
    if kind is None:
        raise ValueError(f"unknown type {value.get('type')!r}")
    return kind(**{name: decode(item) for name, item in value.items() if name != "type"})


def _attributes(change: FileChange) -> str:
    owner = change.owner or ("root" if change.root else None)
    return f"mode {change.mode:o}{f', owner {owner}' if owner else ''}"


def _then(title: str, reload: tuple[tuple[str, ...], ...]) -> str:
    return ", then ".join([title, *(f"`{shlex.join(argv)}`" for argv in reload)])
