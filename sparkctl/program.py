"""How `run` runs a `kind: command` recipe: shown, started, its output followed."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import click

from sparkctl import __version__
from sparkctl.options import Options

if TYPE_CHECKING:
    from cluster.inventory import Inventory
    from launch.handle import JobHandle
    from launch.recipe import CommandRecipe


def run_command(
    options: Options, recipe: CommandRecipe, source: str, *, detach: bool, dry_run: bool, force: bool
) -> int:
    """Start the programs, and follow what they print until they have ended; Ctrl-C detaches."""
    from launch import programs

    inventory = options.inventory()
    nodes = programs.places(recipe, inventory)
    if dry_run:
        _show(options, recipe, inventory)
        return 0
    with options.pair() as pair:
        if len(nodes) > 1 and not force:
            pair.connect()
            pair.refuse_bad_link()
        job = programs.start(recipe, pair, version=__version__, source=source)
        if detach:
            click.echo(json.dumps({"job": job.id}) if options.json else job.id)
            return 0
        options.say(f"job {job.id}: {job.folder}")
        return follow_program(options, job)


def _show(options: Options, recipe: CommandRecipe, inventory: Inventory) -> None:
    from launch import command, programs

    nodes = programs.places(recipe, inventory)
    sides = command.sides(recipe)[: len(nodes)]
    shown = {
        node.name: shlex.join((recipe.command.peer if side else recipe.command.head) or ())
        for node, side in zip(nodes, sides, strict=True)
    }
    if options.json:
        click.echo(json.dumps({"name": recipe.name, "image": recipe.image, "commands": shown}, indent=1))
        return
    for node, line in shown.items():
        where = f" in a container of {recipe.image}" if recipe.image else ""
        click.echo(f"{click.style(node, bold=True)}{where}: {line}")


def follow_program(options: Options, job: JobHandle) -> int:
    """What its ranks print, until it has ended; Ctrl-C detaches."""
    from sparkctl.jobs import lines

    ranks = [rank.rank for rank in job.spec.ranks]
    try:
        for rank, text in lines(job, ranks, following=True):
            if not options.json:
                click.echo(click.style(f"rank {rank} | ", dim=True) + text)
    except KeyboardInterrupt:
        click.echo(f"\ndetached; the job goes on. sparkctl logs -f {job.id} | sparkctl stop {job.id}", err=True)
        return 0
    state = job.state()
    if options.json:
        click.echo(json.dumps({"job": job.id, "state": state.state, "folder": job.folder}, indent=1))
    if state.state == "failed":
        from sparkctl.run import failure

        raise failure(job, state)
    options.say(f"job {job.id}: {state.state}")
    return 0 if state.state == "succeeded" else 1
