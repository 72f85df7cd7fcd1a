"""How a transfer looks: a bar for each node on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from sparkctl import show

if TYPE_CHECKING:
    from cluster.transfer import Progress as Moved

_EVERY = 5.0  # seconds between lines that nobody redraws


class CarryingView:
    """The progress of what goes to the nodes: bytes, rate and time left. May be told by several threads."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False, stderr=True)
        self._quiet = quiet
        self._live = self._console.is_terminal and not quiet
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[how]}", style="dim"),
            console=self._console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._printed: dict[str, float] = {}
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bars.stop()

    def __call__(self, moved: Moved) -> None:
        """Show how far a transfer is."""
        with self._turn:
            if self._live:
                self._draw(moved)
            elif not self._quiet:
                self._print(moved)

    def _draw(self, moved: Moved) -> None:
        if moved.node not in self._tasks:
            self._tasks[moved.node] = self._bars.add_task(moved.node, total=moved.total, how=moved.how)
        self._bars.update(self._tasks[moved.node], completed=moved.done, total=moved.total, how=moved.how)

    def _print(self, moved: Moved) -> None:
        now = time.monotonic()
        key = f"{moved.node} {moved.how} {moved.total}"
        began, had = self._began.setdefault(key, (now, moved.done))
        is_last = moved.done >= moved.total
        if had >= moved.total or (now < self._printed.get(key, began) + _EVERY and not is_last):
            return  # it was there already, or was told just now
        self._printed[key] = now
        rate = (moved.done - had) / max(now - began, 0.001)
        self._console.print(
            f"{moved.node}: {show.size(moved.done)} of {show.size(moved.total)} {moved.how}, {show.size(rate)}/s"
            + (f", {(moved.total - moved.done) / rate:.0f} s left" if rate and not is_last else ""),
            soft_wrap=True,
        )
