"""A program on a terminal of its own, as a person has it before them: what it shows, and what is typed."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self


class Terminal:
    """Run `argv` on a pseudo-terminal that is its controlling one; ended at the latest when the block is left."""

    def __init__(self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        self.shown = ""
        self._read = 0
        self._screen, keyboard = pty.openpty()
        try:
            self.process = subprocess.Popen(
                ["setsid", "--ctty", *argv], stdin=keyboard, stdout=keyboard, stderr=keyboard, cwd=cwd, env=dict(env)
            )
        finally:
            os.close(keyboard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)

    def expect(self, pattern: str, seconds: float = 400) -> str:
        """Wait until it shows what `pattern` matches, after what was waited for before; returns that."""
        deadline = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.shown, self._read)):
            if not self._look(deadline - time.monotonic()):
                raise AssertionError(f"never showed {pattern!r}; it showed: {self.shown[self._read :]}")
        self._read = found.end()
        return found[0]

    def type(self, line: str) -> None:
        """Type a line."""
        os.write(self._screen, line.encode() + b"\n")

    def ended(self, seconds: float = 400) -> int:
        """Wait for its end; the exit status."""
        deadline = time.monotonic() + seconds
        while self._look(deadline - time.monotonic()):
            pass
        return self.process.wait(max(1.0, deadline - time.monotonic()))

    def _look(self, seconds: float) -> bool:
        """Take in what it shows next; False: nothing more comes, or not in time."""
        ready, _, _ = select.select([self._screen], [], [], max(0.0, seconds))
        if not ready:
            return False
        try:
            data = os.read(self._screen, 4096)
        except OSError:  # nobody has the other end any more
            return False
        self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))
        return bool(data)
