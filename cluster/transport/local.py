"""The transport to this machine itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.errors import FailedError
from cluster.files import write_atomically
from cluster.transport import Result


class LocalTransport:
    """Commands are child processes, files are files."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Result:
        """See Transport.run."""
        try:
            # A group of its own, so that what the command started ends with it.
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
            )
        except OSError as error:
            raise self._no_program(argv, error) from None
        with process:
            try:
                stdout, stderr = process.communicate(stdin, timeout)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise FailedError(
                    f"{self.name}: {argv[0]}: not done after {timeout:g} s", "look at what the node is doing"
                ) from None
        return Result(tuple(argv), process.returncode, stdout, stderr)

    def put(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """See Transport.put."""
        try:
            write_atomically(Path(path), data, mode=mode)
        except OSError as error:
            raise FailedError(f"{self.name}: {path}: {error.strerror}", "check the path and the free space") from None

    def get(self, path: str, *, offset: int = 0) -> bytes:
        """See Transport.get."""
        try:
            with Path(path).open("rb") as file:
                file.seek(offset)
                return file.read()
        except OSError as error:
            raise FailedError(f"{self.name}: {path}: {error.strerror}", "check the path") from None

    def start(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        """See Transport.start."""
        with open(log, "ab", opener=_for_the_owner) as output:
            try:
                process = subprocess.Popen(
                    list(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=env,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                raise self._no_program(argv, error) from None
        return process.pid

    def forward(self, port: int) -> int:
        """See Transport.forward: here both loopbacks are the same."""
        return port

    def _no_program(self, argv: Sequence[str], error: OSError) -> FailedError:
        return FailedError(f"{self.name}: {argv[0]}: {error.strerror}", "install it, or correct the path")


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
