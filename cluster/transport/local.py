"""The transport to this machine itself."""

from __future__ import annotations

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
            done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout, check=False)
        except OSError as error:
            raise FailedError(f"{self.name}: {argv[0]}: {error.strerror}", "install it, or correct the path") from None
        except subprocess.TimeoutExpired:
            raise FailedError(
                f"{self.name}: {argv[0]}: not done after {timeout:g} s", "look at what the node is doing"
            ) from None
        return Result(tuple(argv), done.returncode, done.stdout, done.stderr)

    def put(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """See Transport.put."""
        write_atomically(Path(path), data, mode=mode)

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
        with Path(log).open("ab") as output:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                cwd="/",
                start_new_session=True,
            )
        return process.pid

    def forward(self, port: int) -> int:
        """See Transport.forward: here both loopbacks are the same."""
        return port
