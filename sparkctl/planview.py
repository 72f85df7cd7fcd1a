"""How a plan looks: what each node holds and what that takes, how fast it will be, and what all of it rests on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from launch.box import GIB
from launch.capacity import rule_of_thumb
from launch.speed import ServingSpeed
from launch.workload import Serving
from sparkctl import show

if TYPE_CHECKING:
    from launch.plan import Plan, RankPlan
    from launch.start import Prepared
    from launch.strategies import Choice

# What a node's memory is for, in the order of the bar: the field, its name on the screen, its colour.
_USES = (
    ("weights", "weights", "bright_blue"),
    ("kv_cache", "KV cache", "cyan"),
    ("lora", "LoRA", "magenta"),
    ("gradients", "gradients", "yellow"),
    ("optimizer", "optimizer", "bright_red"),
    ("activations", "activations", "green"),
    ("runtime", "runtime, buffers", "white"),
)
_BAR = 24  # columns
_UNKNOWN_SPEED = "not predicted: nothing is known of this machine's; `--memory 121.7` plans for two DGX Sparks"


def print_plan(prepared: Prepared) -> None:
    """Print a plan on standard output: as wide as the terminal; for a program, without a break or padding."""
    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        console.print(screen(prepared))
        return
    console.width = show.UNBROKEN
    with console.capture() as captured:
        console.print(screen(prepared))
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_choice(choice: Choice) -> None:
    """Print what `auto` has come to, and what each strategy would have taken."""
    show.print_table(_strategies(choice))


def screen(prepared: Prepared) -> Group:
    """All of a plan."""
    plan = prepared.plan
    chosen: list[Table | str] = [_strategies(plan.choice), ""] if plan.choice is not None else []
    return Group(_dim(_work(prepared)), "", _memory(plan), "", _speeds(plan), "", *chosen, _grounds(plan))


def title(prepared: Prepared) -> str:
    """The model, in one line."""
    card = prepared.card
    sizes = f"{_count(card.parameters)} parameters"
    if card.experts:
        sizes += f" ({_count(card.active)} a token)"
    return f"{card.name}: {sizes}, {_plural(card.layers, 'layer')}, {show.size(card.total_bytes)} as stored"


def _work(prepared: Prepared) -> str:
    work, plan = prepared.plan.work, prepared.plan
    over = f"{plan.strategy} over {len(plan.ranks)} nodes" if len(plan.ranks) > 1 else "whole on one node"
    if isinstance(work, Serving):
        return f"serve {_plural(work.sequences, 'sequence')} of up to {_plural(work.context, 'token')}, {over}"
    what = "all weights" if work.rank is None else f"LoRA of rank {work.rank}"
    batch = f"{_plural(work.micro_batches, 'micro-batch', 'es')} of {work.rows} x {work.length:,} tokens a step"
    return f"{what}, {batch}, {over}"


def _grid(columns: int = 1) -> Table:
    """Labels, and one or more columns beside them; as wide in every section of the screen."""
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(min_width=15, no_wrap=True)
    for _ in range(columns):
        table.add_column()
    return table


def _memory(plan: Plan) -> Table:
    table = _grid(len(plan.ranks))
    table.add_row(_dim("memory"), *(Text.assemble((r.node, "bold"), (f" (rank {r.rank})", "dim")) for r in plan.ranks))
    shared = plan.strategy in ("fsdp2", "zero3")
    table.add_row("  holds", *("a share of everything" if shared else str(rank.cut) for rank in plan.ranks))
    for name, label, colour in _USES:
        if any(getattr(rank.memory, name) for rank in plan.ranks):
            amounts = (_amount(getattr(rank.memory, name)) for rank in plan.ranks)
            table.add_row(Text.assemble(("\u2588 ", colour), label), *amounts)
    table.add_row(Text("  needed", style="bold"), *(Text(_amount(r.memory.total), style="bold") for r in plan.ranks))
    table.add_row("  usable", *(_usable(rank) for rank in plan.ranks))
    table.add_row("", *(_bar(rank) for rank in plan.ranks))
    table.add_row("", *(_verdict(rank) for rank in plan.ranks))
    return table


def _usable(rank: RankPlan) -> str:
    """What the rank may use, and of what; `free of` where other programs leave less than the box has."""
    return f"{_amount(rank.box.usable)} {'free of' if rank.box.is_busy else 'of'} {rank.box.total / GIB:.1f}"


def _verdict(rank: RankPlan) -> Text:
    if rank.headroom >= 0:
        return Text(f"fits, {show.size(rank.headroom)} to spare", style="bold green")
    return Text(f"{show.size(-rank.headroom)} too much", style="bold red")


def _bar(rank: RankPlan) -> Text:
    """What is used of what may be, each use in its colour; where it does not fit, a mark stands where the node ends."""
    scale = max(rank.box.usable, rank.memory.total, 1) / _BAR
    bar, done, taken = Text(no_wrap=True), 0, 0
    for name, _, colour in _USES:
        taken += getattr(rank.memory, name)
        end = round(taken / scale)
        bar.append("\u2588" * (end - done), colour)
        done = end
    bar.append("\u2591" * (_BAR - done), "dim")
    if rank.headroom < 0:
        limit = min(round(rank.box.usable / scale), _BAR - 1)
        return Text.assemble(bar[:limit], ("\u2502", "bold red"), bar[limit + 1 :])
    return bar


def _speeds(plan: Plan) -> Table:
    table, speed, work = _grid(), plan.speed, plan.work
    if speed is None:
        table.add_row(_dim("speed"), _UNKNOWN_SPEED)
        return table
    table.add_row(_dim("speed"), _dim("predicted" if plan.fits else "predicted, were there room"))
    if isinstance(speed, ServingSpeed):
        assert isinstance(work, Serving)
        table.add_row("  decode", f"{_rate(speed.one)} for one sequence alone")
        if work.sequences > 1:
            table.add_row("", f"{_rate(speed.full)} for {work.sequences} together")
        table.add_row("  prefill", f"{_rate(speed.prefill)} of long prompts")
    else:
        table.add_row("  step", f"{_time(speed.step)}, {_rate(speed.tokens)}")
    table.add_row("  load", _time(speed.load))
    return table


def _strategies(choice: Choice) -> Table:
    table = _grid()
    table.add_row(_dim("strategy"), Text(f"{choice.strategy}: {choice.reason}"))
    for option in choice.options:
        if option.absent:
            found = f"{option.absent.replace(chr(96), '')} is not in this version"
        else:
            step = "" if option.step is None else f"{_time(option.step)} a step"
            lacking = f"{show.size(option.lacking)} too much" if option.lacking > 0 else ""
            found = ", ".join(part for part in (step, lacking) if part) or "fits"
        chosen = option.strategy == choice.strategy
        table.add_row(Text(f"  {option.strategy}", style="bold" if chosen else ""), found)
    return table


def _grounds(plan: Plan) -> Table:
    table = _grid()
    ways = [way.text.replace("`", "") for way in plan.ways]
    if plan.fits:
        table.add_row(_dim("room for"), ", or ".join(ways))
    elif ways:
        _add_lines(table, "would fit", (Text(way, style="bold") for way in ways))
    else:
        together = rule_of_thumb(sum(rank.box.total for rank in plan.ranks))
        table.add_row(
            _dim("would fit"),
            f"nothing that the recipe can say; as a rule {len(plan.ranks)} such nodes hold {_count(together)} in 4 bits",
        )
    _add_lines(table, "assumed", (_dim(line) for line in plan.assumptions))
    return table


def _add_lines(table: Table, label: str, lines: Iterable[Text]) -> None:
    for index, line in enumerate(lines):
        table.add_row(_dim(label) if index == 0 else "", line)


def _dim(text: str) -> Text:
    return Text(text, style="dim")


def _amount(count: float) -> str:
    """Bytes, with a digit after the point in GiB and the units below one another, so that a column can be compared."""
    number, unit = (f"{count / GIB:.1f}", "GiB") if count >= GIB else show.size(count).split()
    return f"{number:>6} {unit}"


def _count(number: float) -> str:
    """A count in three to four digits: 405.9 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f}"


def _rate(tokens: float) -> str:
    digits = 0 if tokens >= 100 else 1 if tokens >= 10 else 2
    return f"{tokens:,.{digits}f} tokens/s"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _plural(count: int, one: str, ending: str = "s") -> str:
    return f"{count:,} {one}{'' if count == 1 else ending}"


def document(prepared: Prepared) -> dict[str, object]:
    """All of a plan, for programs. Sizes are bytes, speeds tokens/s, times seconds."""
    card, plan = prepared.card, prepared.plan
    return {
        "name": prepared.recipe.name,
        "model": card.source,
        "parameters": card.parameters,
        "active_parameters": round(card.active),
        "bytes": card.total_bytes,
        "has_weights": card.has_weights,
        "quantized": card.quantized,
        "embedding_bytes": card.embedding_bytes,
        "head_bytes": card.head_bytes,
        "layers": [
            {
                "parameters": part.parameters,
                "bytes": part.stored,
                "held": sum(plan.precision.size(weight) for weight in part.weights),
                "cache": None if part.cache is None else asdict(part.cache),
            }
            for part in card.stack
        ],
        "strategy": plan.strategy,
        "choice": None if plan.choice is None else asdict(plan.choice),
        "precision": asdict(plan.precision),
        "embedded": prepared.inventory.embedded,
        "fits": plan.fits,
        "ranks": [
            {
                "rank": rank.rank,
                "node": rank.node,
                "start": rank.cut.start,
                "end": rank.cut.end,
                "weight_bytes": rank.weight_bytes,
                "memory": asdict(rank.memory),
                "needed": rank.memory.total,
                "usable": rank.box.usable,
                "headroom": rank.headroom,
                "fits": rank.headroom >= 0,
                "box": {"total": rank.box.total, "available": rank.box.available, "about": rank.box.about},
            }
            for rank in plan.ranks
        ],
        "predicted": None if plan.speed is None else asdict(plan.speed),
        "ways": [{change.key: change.value for change in way.changes} for way in plan.ways],
        "assumptions": list(plan.assumptions),
    }
