"""A command that runs on a node: fed, listened to, and ended within its time and its measure. The same for every transport."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from cluster.errors import FailedError
from cluster.transport import OUTPUT_LIMIT, Result

# RFC 7464's record separator: it opens an answer, and nothing that a login shell prints by itself has it.
ANSWER = b"\x1e"


def bounded(argv: Sequence[str], timeout: float) -> list[str]:
    """The argv that ends itself on the node a second after we have given up, for when we cannot end it: it is root's, or the
    connection is lost."""
    return ["timeout", "--signal=KILL", f"{timeout + 1:g}", *argv]


class Stream(Protocol):
    """The command's three byte streams and its end, as a transport has them. Reading raises FailedError when the node is lost."""

    @property
    def ended(self) -> bool:
        """Whether both outputs have ended and all of them has been received."""
        ...

    def send(self, data: bytes) -> None:
        """Give `data` to the command; waits until it is taken. Nothing happens when the command does not want it."""
        ...

    def close_stdin(self) -> None:
        """Say that no more comes."""
        ...

    def receive(self, timeout: float) -> tuple[bytes, bytes]:
        """What came on stdout and stderr; both are empty when nothing did within `timeout` seconds, or at the end."""
        ...

    def status(self, timeout: float) -> int | None:
        """The exit status of a command whose outputs have ended; None: it runs on all the same."""
        ...

    def kill(self) -> None:
        """End the command, and whatever it started in its process group."""
        ...

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""
        ...


class Process:
    """A running command. What it printed and nobody has taken yet is in `stdout` and `stderr`."""

    def __init__(self, node: str, argv: Sequence[str], stream: Stream, *, limit: int = OUTPUT_LIMIT) -> None:
        self.node = node
        self.argv = tuple(argv)
        self.stdout = bytearray()
        self.stderr = bytearray()
        self._stream = stream
        self._limit = limit
        self._sending = threading.Lock()

    def feed(self, data: bytes, *, last: bool) -> None:
        """Send `data` beside whatever else goes on: a command may well print before it has read all of its input."""
        threading.Thread(target=self._send, args=(data, last), daemon=True).start()

    def _send(self, data: bytes, last: bool) -> None:
        with self._sending:
            if data:
                self._stream.send(data)
            if last:
                self._stream.close_stdin()

    def listen(self, deadline: float, heard: Callable[[], bool]) -> bool:
        """Take in output until `heard` says that it is enough (True) or the outputs end (False).

        Raises:
            FailedError: the clock (time.monotonic) passed `deadline`, the output its limit; the command is ended then.
        """
        while not heard():
            if self._stream.ended:
                return False
            left = deadline - time.monotonic()
            if left <= 0:
                raise self.late()
            out, err = self._stream.receive(left)
            self.stdout += out
            self.stderr += err
            if len(self.stdout) + len(self.stderr) > self._limit:
                self.kill()
                raise FailedError(
                    f"{self.node}: {self.argv[0]}: printed more than {self._limit >> 20 or 1} MiB, so it was cut off",
                    "log in there and look at what it prints",
                )
        return True

    def finish(self, deadline: float) -> Result:
        """Take in all the output and wait for the end."""
        self.listen(deadline, lambda: False)
        status = self._stream.status(max(0.0, deadline - time.monotonic()))
        if status is None:
            raise self.late()
        return Result(self.argv, status, bytes(self.stdout), bytes(self.stderr))

    def late(self) -> FailedError:
        """End the command, and the error that says so."""
        self.kill()
        return FailedError(f"{self.node}: {self.argv[0]}: not done in time", "look at what the node is doing")

    def kill(self) -> None:
        """End the command where that can be done, and let go of it."""
        self._stream.kill()
        self._stream.close()

    def close(self) -> None:
        """Let go of the command."""
        self._stream.close()


def communicate(process: Process, stdin: bytes, timeout: float) -> Result:
    """Feed a command, wait for its end, and let go of it, whatever happens.

    Raises:
        FailedError: it took longer than `timeout` seconds, printed too much, or the node was lost.
    """
    deadline = time.monotonic() + timeout
    try:
        process.feed(stdin, last=True)
        return process.finish(deadline)
    except BaseException:
        process.kill()
        raise
    finally:
        process.close()


class Session:
    """A command that answers orders: one line in, one line out. Safe to share between threads."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._turn = threading.Lock()
        self.closed = False

    def ask(self, order: bytes, *, timeout: float) -> bytes:
        """Send an order (no newline in it) and wait for its answer: a line that opens with ANSWER. Other lines are noise.

        Raises:
            FailedError: no answer within `timeout` seconds, or the command has ended. The session is closed then.
        """
        with self._turn:
            try:
                self._process.feed(order + b"\n", last=False)
                return self._answer(time.monotonic() + timeout)
            except BaseException:
                self.closed = True
                self._process.kill()
                raise

    def _answer(self, deadline: float) -> bytes:
        process = self._process
        while process.listen(deadline, lambda: b"\n" in process.stdout):
            line, _, rest = bytes(process.stdout).partition(b"\n")
            process.stdout[:] = rest
            _, mark, answer = line.partition(ANSWER)
            if mark:
                return answer
        said = process.stderr.decode(errors="replace").strip().splitlines()
        raise FailedError(
            f"{process.node}: {process.argv[0]}: ended without an answer{f': {said[-1][:200]}' if said else ''}",
            "look at what the node is doing",
        )

    def nudge(self) -> None:
        """Send an empty line, which says only that we are still here; not while an order is under way."""
        if self._turn.acquire(blocking=False):
            try:
                if not self.closed:
                    self._process.feed(b"\n", last=False)
            finally:
                self._turn.release()

    def close(self) -> None:
        """Say that no more orders come, wait a moment for the command's end, and let go of it."""
        if self.closed:
            return
        self.closed = True
        with self._turn, contextlib.suppress(FailedError):
            self._process.feed(b"", last=True)
            self._process.finish(time.monotonic() + 5.0)
        self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
