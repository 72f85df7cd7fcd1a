"""The one protocol to a node. `local` speaks it to this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Result:
    """What a command on a node gave back."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes


class Transport(Protocol):
    """A node that commands run on and files go to. Every argv is a list; no shell reads it."""

    name: str

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Result:
        """Run a command to its end; a non-zero status is a result, not an error.

        Raises:
            FailedError: the program is not there, or `timeout` seconds passed (the command is ended then).
        """
        ...

    def put(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """Replace a file in one step: all of `data`, or the old file."""
        ...

    def get(self, path: str, *, offset: int = 0) -> bytes:
        """The bytes of a file from `offset` on.

        Raises:
            FailedError: the file cannot be read.
        """
        ...

    def start(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        """Start a command that outlives this program, in a session of its own, and append its output to `log`.

        Returns its process id.
        """
        ...

    def forward(self, port: int) -> int:
        """A port on this machine's loopback that leads to `port` on the node's loopback."""
        ...
