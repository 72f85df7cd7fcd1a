"""Processes that the lab starts and talks to over their stdin and stdout, a line each way."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .namespaces import popen_in

HERE = Path(__file__).parent


def python(process: str) -> list[str]:
    """The argv that runs a module of processes/, without the time that ``site`` and the rest of this package take."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from processes.{process} import main; main()"
    return [sys.executable, "-IS", "-c", code]


class Daemon:
    """A process that says ``ready`` when it is, then answers each line that it reads with one line.

    Args:
        argv: what to run; it may end in a chain of processes (``unshare --fork``), of which the last one answers.
        log: its stderr goes here.
        within: a process, in whose process namespace to start; None: as PID 1 of a new one.
        pass_fds: file descriptors that it inherits.

    Raises RuntimeError with the log's end when it ends instead of answering.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        log: Path,
        *,
        within: int | None,
        pass_fds: Sequence[int] = (),
        ready: str = "ready",
    ) -> None:
        self.log = log
        self._turn = threading.Lock()
        self._ready = ready
        self._pid = 0
        with log.open("ab") as stderr:
            self.process: subprocess.Popen[str] = popen_in(
                within,
                list(map(str, argv)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd="/",
                pass_fds=tuple(pass_fds),
                start_new_session=True,  # a Ctrl-C on the terminal is for whoever holds the lab
            )

    def wait_ready(self) -> None:
        self._expect(self._ready)
        self._pid = _last_of_chain(self.process.pid)

    @property
    def pid(self) -> int:
        """Of the last process of the chain, as this machine counts."""
        return self._pid

    def ask(self, *words: object) -> None:
        """Send one command and wait until it is done."""
        with self._turn:
            self.tell(*words)
            self._expect("ok")

    def tell(self, *words: object) -> None:
        assert self.process.stdin
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def _expect(self, answer: str) -> None:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        if line != answer:
            said = line or self.log.read_text(errors="replace")[-1000:] or "nothing"
            raise RuntimeError(f"{self.process.args!r} should have said {answer!r} and said: {said}")

    def wait(self, timeout: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for its end, doing something ``meanwhile``, and close our ends of its pipes. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while self.process.poll() is None:
            meanwhile()
            if time.monotonic() > end:
                raise TimeoutError(f"{self.process.args!r} has not ended within {timeout:g} s")
            time.sleep(0.002)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


def _last_of_chain(pid: int) -> int:
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid
