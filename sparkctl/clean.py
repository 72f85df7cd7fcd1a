"""`clean`: what lies on the nodes that nothing refers to any more."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from sparkctl.options import Options, common

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launch.leftovers import Leftover


@click.command()
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.option("--results", is_flag=True, help="Ended jobs with their results too: adapters, models, checkpoints.")
@common
def clean(options: Options, yes: bool, results: bool) -> int:
    """List what nothing refers to any more on the nodes, and remove it when you agree.

    That is: ended jobs without a result, halves of models that no job reads, interrupted copies, code of other versions.
    """
    from cluster import transport
    from launch import leftovers

    mine = options.inventory()
    # Both ranks of the embedded pair are on this machine.
    nodes = [transport.to(node) for node in (mine.nodes[:1] if mine.embedded else mine.nodes)]
    try:
        found = leftovers.leftovers(leftovers.look(nodes), results=results)
        if not options.json:
            _show(options, found)
        agreed = bool(found) and (yes or (not options.json and _asked()))
        gone = leftovers.remove(nodes, found) if agreed else ()
    finally:
        for node in nodes:
            node.close()
    if options.json:
        click.echo(
            json.dumps({"found": [asdict(one) for one in found], "removed": [one.path for one in gone]}, indent=1)
        )
    elif agreed:
        _tell(options, found, gone)
    return 1 if agreed and len(gone) < len(found) else 0


def _asked() -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        click.echo("nothing was removed: `sparkctl clean --yes` does it", err=True)
        return False
    return click.confirm("Remove it all?", err=True)


def _show(options: Options, found: Sequence[Leftover]) -> None:
    from rich.table import Table

    from sparkctl import show

    if not found:
        options.say("nothing to clean: all that lies on the nodes is referred to")
        return
    if options.quiet:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("node", "what", "where"):
        table.add_column(column)
    table.add_column("size", justify="right")
    table.add_column("why")
    for one in found:
        table.add_row(one.node, one.kind, one.path, show.size(one.size), show.cut_short(one.why))
    show.print_table(table)
    options.say(f"{show.size(sum(one.size for one in found))} in all")


def _tell(options: Options, found: Sequence[Leftover], gone: Sequence[Leftover]) -> None:
    from sparkctl import show

    options.say(f"removed {show.size(sum(one.size for one in gone))}")
    for one in found:
        if one not in gone:
            click.echo(f"{one.node}: {one.path} is in use, or cannot be removed", err=True)
