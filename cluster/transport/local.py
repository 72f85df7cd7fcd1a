"""The transport to this machine itself."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.errors import FailedError
from cluster.files import write_atomically
from cluster.transport import FILE_LIMIT, OUTPUT_LIMIT, Home, Result
from cluster.transport.process import Process, Session, bounded, communicate
from cluster.transport.sudo import Sudo, Tokens, become_root, elevated

_CHUNK = 1 << 16


class LocalTransport:
    """Commands are child processes, files are files."""

    def __init__(self, name: str, *, python: str | None = None) -> None:
        self.name = name
        self.python = str(Path(python).expanduser()) if python else sys.executable

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout: float = 60.0,
        limit: int = OUTPUT_LIMIT,
        sudo: Sudo | None = None,
    ) -> Result:
        """See Transport.run."""
        return communicate(self._open(argv, sudo, limit, timeout), stdin, timeout)

    def session(self, argv: Sequence[str], *, sudo: Sudo | None = None) -> Session:
        """See Transport.session."""
        return Session(self._open(argv, sudo, OUTPUT_LIMIT, None))

    def _open(self, argv: Sequence[str], sudo: Sudo | None, limit: int, timeout: float | None) -> Process:
        if sudo is None or os.geteuid() == 0:
            return Process(self.name, argv, self._child(argv), limit=limit)
        tokens = Tokens.new()
        command = argv if timeout is None else bounded(argv, timeout)
        child = self._child(elevated(command, tokens))
        process = Process(self.name, argv, child, limit=limit)
        become_root(process, sudo, tokens)
        return process

    def _child(self, argv: Sequence[str]) -> _Child:
        try:
            return _Child(argv)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            raise self._no_program(argv, error) from None

    def put(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """See Transport.put."""
        try:
            write_atomically(Path(path), data, mode=mode)
        except OSError as error:
            raise FailedError(f"{self.name}: {path}: {error.strerror}", "check the path and the free space") from None

    def get(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """See Transport.get."""
        try:
            with Path(path).open("rb") as file:
                file.seek(offset)
                data = file.read(FILE_LIMIT + 1 if length is None else length)
        except OSError as error:
            raise FailedError(f"{self.name}: {path}: {error.strerror}", "check the path") from None
        if length is None and len(data) > FILE_LIMIT:
            raise FailedError(f"{self.name}: {path}: larger than {FILE_LIMIT >> 20} MiB", "copy it another way")
        return data

    def start(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        """See Transport.start."""
        try:
            output = open(log, "ab", opener=_for_the_owner)  # noqa: SIM115 - a path has no opener; closed below
        except OSError as error:
            raise FailedError(f"{self.name}: {log}: {error.strerror}", "check the path and the free space") from None
        with output:
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
            except (OSError, ValueError) as error:
                raise self._no_program(argv, error) from None
        return process.pid

    def forward(self, port: int) -> int:
        """See Transport.forward: here both loopbacks are the same."""
        return port

    def home(self) -> Home:
        """See Transport.home."""
        user = str(Path.home())
        return Home(user, str(Path(os.environ.get("SPARKCTL_HOME") or f"{user}/.sparkctl").expanduser().absolute()))

    def close(self) -> None:
        """See Transport.close: there is no connection."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _no_program(self, argv: Sequence[str], error: OSError | ValueError) -> FailedError:
        reason = error.strerror if isinstance(error, OSError) else error
        return FailedError(f"{self.name}: {argv[0]}: {reason}", "install it, or correct the path")


class _Child:
    """A child process as a Stream."""

    def __init__(self, argv: Sequence[str]) -> None:
        # A session of its own, so that what the command started ends with it, and sudo finds no terminal to ask on.
        self._process = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin = self._process.stdin
        self._outputs = (self._process.stdout, self._process.stderr)
        self._selector = selectors.DefaultSelector()
        for output in self._outputs:
            self._selector.register(output, selectors.EVENT_READ)

    @property
    def ended(self) -> bool:
        return not self._selector.get_map()

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed meanwhile
            while view:
                view = view[self._stdin.write(view) or 0 :]

    def close_stdin(self) -> None:
        with contextlib.suppress(OSError):
            self._stdin.close()

    def receive(self, timeout: float) -> tuple[bytes, bytes]:
        came = dict.fromkeys(self._outputs, b"")
        for key, _ in self._selector.select(timeout):
            output = self._outputs[key.fileobj is not self._outputs[0]]
            came[output] = os.read(output.fileno(), _CHUNK)
            if not came[output]:
                self._selector.unregister(output)
        out, err = self._outputs
        return came[out], came[err]

    def status(self, timeout: float) -> int | None:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        # Once it has been waited for, its number may be a stranger's. What is root's is ended by its own time-out.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self._selector.close()
        for pipe in (*self._outputs, self._stdin):
            pipe.close()
        end = time.monotonic() + 1.0
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
