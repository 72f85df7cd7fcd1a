"""How plans and progress look: tables and bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cluster.inventory import Inventory
    from launch.job import JobState
    from launch.start import Prepared
    from sparkctl.summary import Summary

EMBEDDED = "embedded pair: {ranks} on this machine over loopback (gloo), no Spark involved"

ASKED = "asked about: boxes of {0:g} GiB, {1} of them, not the pair"

UNBROKEN = 10_000  # columns


def banner(inventory: Inventory, *, ranks: int = 2) -> str:
    """Which pair is used, in one line."""
    if inventory.embedded:
        return EMBEDDED.format(ranks="two ranks" if ranks == 2 else "one rank")
    return f"pair: {inventory.head.name} (rank 0) and {inventory.peer.name} (rank 1)"


def size(count: float) -> str:
    """Bytes in binary units, three digits."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} GiB" if count < 1000 else f"{count:,.0f} GiB"


def title(prepared: Prepared) -> str:
    """The model and how it is run, in one line."""
    card = prepared.card
    return (
        f"{card.name}: {card.parameters:,} parameters, {size(card.total_bytes)}, "
        f"{card.layers} layer{'s' * (card.layers != 1)}, {prepared.plan.strategy}"
    )


def plan_table(prepared: Prepared) -> Table:
    """Who holds what."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("rank", justify="right")
    table.add_column("node")
    table.add_column("holds")
    table.add_column("weights", justify="right")
    table.add_column("share", justify="right")
    together = sum(rank.weight_bytes for rank in prepared.plan.ranks)
    for rank in prepared.plan.ranks:
        share = f"{rank.weight_bytes / together:.0%}"
        table.add_row(str(rank.rank), rank.node, str(rank.cut), size(rank.weight_bytes), share)
    return table


def cut_short(text: str) -> Text:
    """A cell that is cut where the terminal ends, so that its row stays a line and the other cells stay whole."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def print_table(table: Table) -> None:
    """On standard output: as wide as the terminal, or, where a program reads it, as wide as it takes to break no line."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = UNBROKEN
    console.print(table)


# What a user waits for in the states before the first step, and how it may end; what succeeded keeps its last loss.
_DOING = {
    "staging": "starting",
    "starting": "loading the model",
    "running": "running",
    "failed": "failed",
    "stopped": "stopped",
}


class TrainingView:
    """The progress of a fine-tune: one bar on a terminal, one line a logged step elsewhere."""

    def __init__(self, name: str, *, quiet: bool) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._quiet = quiet
        self._live = self._console.is_terminal and not quiet
        self._progress = _bar(self._console)
        self._task = self._progress.add_task(name, total=None, note="starting")
        self._printed_at = 0.0
        self._seen: list[dict[str, Any]] = []

    def summary(self) -> Summary | None:
        """What it came to, as far as it was seen."""
        from sparkctl.summary import Summary

        return Summary.of(self._seen)

    def __enter__(self) -> TrainingView:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def state(self, name: str) -> None:
        """The job's state moved."""
        if self._live and name in _DOING:
            self._progress.update(self._task, note=_DOING[name])
        if self._live and name in ("succeeded", "failed", "stopped"):
            self._progress.stop_task(self._task)

    def note(self, state: JobState) -> None:
        """Why it is where it is, if there is more to say: it starts again, say."""
        if state.reason and not state.ended and not self._quiet:
            self._progress.console.print(state.reason, soft_wrap=True)

    def entries(self, entries: Iterable[dict[str, Any]]) -> None:
        """New lines of metrics.jsonl."""
        for entry in entries:
            self._seen.append(entry)
            if self._live:
                self._update(entry)
            elif not self._quiet and self._due(entry):
                self._console.print(line(entry), soft_wrap=True)

    def _update(self, entry: dict[str, Any]) -> None:
        if "loss" in entry:
            note = f"loss {entry['loss']:.3f}  accuracy {entry['token_accuracy']:.0%}  {entry['tokens_per_s']:,.0f} tokens/s"
            self._progress.details = details(entry)
            self._progress.update(self._task, completed=entry["step"], total=entry["total_steps"], note=note)
        else:
            self._progress.console.print(line(entry))

    def _due(self, entry: dict[str, Any]) -> bool:
        """In a file or a pipe: evaluations, the last step, and otherwise a line every five seconds."""
        now = time.monotonic()
        if "loss" in entry and entry["step"] not in (1, entry["total_steps"]) and now < self._printed_at + 5:
            return False
        self._printed_at = now
        return True


def line(entry: dict[str, Any]) -> str:
    """One logged step, or one evaluation, in words."""
    if "eval_loss" in entry:
        return f"step {entry['step']}: evaluation loss {entry['eval_loss']:.4f}, token accuracy {entry['eval_token_accuracy']:.1%}"
    return (
        f"step {entry['step']}/{entry['total_steps']}: epoch {entry['epoch']:.2f}, loss {entry['loss']:.4f}, "
        f"grad norm {entry['grad_norm']:.3f}, learning rate {entry['learning_rate']:.2e}, "
        f"token accuracy {entry['token_accuracy']:.1%}, {entry['tokens_per_s']:,.0f} tokens/s"
    )


def details(entry: dict[str, Any]) -> str:
    """What stands below the bar."""
    from sparkctl.summary import vitals

    found = [
        ("epoch", f"{entry['epoch']:.2f}"),
        ("grad norm", f"{entry['grad_norm']:.3g}"),
        ("rate", f"{entry['learning_rate']:.2e}"),
        *vitals(entry),
    ]
    return "  " + "  ".join(f"{name} {value}" for name, value in found if value)


class _Bar(Progress):
    """A bar, and a line of details below it."""

    details = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The two lines."""
        yield from super().get_renderables()
        if self.details:
            yield Text(self.details, style="dim", no_wrap=True, overflow="ellipsis")


class _Steps(ProgressColumn):
    """How many steps of how many, once that is known."""

    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed)}/{int(task.total)}" if task.total else "", style="bold")


class _TimeLeft(TimeRemainingColumn):
    """How long it will take still, while anything runs."""

    def render(self, task: Task) -> Text:
        return Text() if task.stop_time is not None or not task.completed else super().render(task)


def _bar(console: Console) -> _Bar:
    return _Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28 if console.width >= 100 else 12),
        _Steps(),
        TextColumn("{task.fields[note]}"),
        _TimeLeft(compact=True),
        console=console,
    )
