"""The one protocol to a node: `local` speaks it to this machine, `ssh` to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:  # pydantic must not load with the command line
    from cluster.inventory import Node
    from cluster.transport.process import Session
    from cluster.transport.sudo import Sudo

# Bytes that a command may print before it is cut off: a broken or hostile node must not fill this machine's memory.
OUTPUT_LIMIT = 8 << 20
# Bytes that `get` takes unless it is told how many: more than any file that is read whole, less than would hurt.
FILE_LIMIT = 256 << 20


@dataclass(frozen=True)
class Result:
    """What a command on a node gave back.

    `status` is the exit status, and negative when a signal ended the command: -1 over SSH, the signal's number otherwise.
    """

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class Home:
    """Where things go on a node, as absolute paths: its user's home folder, and $SPARKCTL_HOME (else ~/.sparkctl)."""

    user: str
    sparkctl: str


class Transport(Protocol):
    """A node that commands run on and files go to. Every argv is a list; no shell reads it. Safe to share between threads.

    Every method raises FailedError when the node cannot be reached or does not answer, and RefusedError (over SSH) when its
    host key is unknown (then `UnknownHostKeyError`), revoked, or not the one that is known.
    """

    name: str

    @property
    def python(self) -> str:
        """The Python interpreter on the node, for use in an argv."""
        ...

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout: float = 60.0,
        limit: int = OUTPUT_LIMIT,
        sudo: Sudo | None = None,
    ) -> Result:
        """Run a command to its end; a non-zero status is a result, not an error.

        Args:
            timeout: seconds; at its end the command is ended too, where that can be done.
            limit: bytes of output after which the command is ended.
            sudo: run it as root.

        Raises:
            FailedError: the program is not there, it took too long or printed too much; root was refused (`SudoError`).
        """
        ...

    def session(self, argv: Sequence[str], *, sudo: Sudo | None = None) -> Session:
        """Start a command to talk with, line by line, until one side ends it.

        Raises:
            FailedError: the program is not there (of a local node), or root was refused (`SudoError`).
        """
        ...

    def put(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """Replace a file in one step: all of `data`, or the old file. `path` is absolute; its folder must be there.

        Raises:
            FailedError: it cannot be written.
        """
        ...

    def get(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of a file from `offset` on: `length` of them at most, else all.

        Raises:
            FailedError: the file cannot be read, or without `length` is larger than FILE_LIMIT.
        """
        ...

    def start(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        """Start a command that outlives this program and its connection, in a session of its own.

        Its output is appended to the file `log`; its environment is `env` alone, else the node's. Returns its process id.

        Raises:
            FailedError: the program is not there, or the log cannot be written.
        """
        ...

    def forward(self, port: int) -> int:
        """A port on this machine's loopback that leads to `port` on the node's loopback, until `close`.

        It takes connections when this returns; over SSH one is closed at once where nothing listens on the node.
        """
        ...

    def home(self) -> Home:
        """The folders of the node's user; asked once."""
        ...

    def close(self) -> None:
        """End the connection, with whatever still runs in the foreground. The next call connects anew."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def to(node: Node) -> Transport:
    """The transport to a node of the inventory; it connects on first use."""
    if node.is_local:
        from cluster.transport.local import LocalTransport

        return LocalTransport(node.name, python=node.python)
    from cluster.transport.ssh import SshTransport

    assert node.host is not None  # the inventory sees to it
    return SshTransport(
        node.name,
        node.host,
        user=node.user,
        port=None if node.port == 22 else node.port,  # the default leaves it to ~/.ssh/config
        identity_file=node.identity_file,
        python=node.python or "python3",
    )
