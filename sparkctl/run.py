"""`plan` and `run`: a recipe is shown, started and followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparkctl import __version__
from sparkctl.options import Options, common

if TYPE_CHECKING:
    from launch.job import JobFolder, JobState
    from launch.start import Prepared

_recipe = click.argument("recipe", type=click.Path(path_type=Path))
_overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a key of the recipe; may be repeated."
)


@click.command()
@_recipe
@_overrides
@common
def plan(options: Options, recipe: Path, overrides: tuple[str, ...]) -> None:
    """Show how the model of RECIPE is laid out over the pair; nothing is started."""
    _show(options, _prepare(options, recipe, overrides))


@click.command()
@_recipe
@_overrides
@click.option("--detach", is_flag=True, help="Start, print the job's id and return.")
@click.option("--dry-run", is_flag=True, help="Check and plan, start nothing.")
@common
def run(options: Options, recipe: Path, overrides: tuple[str, ...], detach: bool, dry_run: bool) -> int:
    """Run RECIPE on the pair: check it, plan it, start it, follow it. Ctrl-C detaches; the job goes on."""
    from launch import start
    from launch.recipe import InferenceRecipe

    prepared = _prepare(options, recipe, overrides)
    if dry_run:
        _show(options, prepared)
        return 0
    if isinstance(prepared.recipe, InferenceRecipe):
        from cluster.errors import RefusedError

        raise RefusedError(
            f"{recipe}: serving over HTTP is not in this version of sparkctl", f"sparkctl ask {recipe} 'your question'"
        )
    if not detach:
        _show(options, prepared)
    folder = start.start(prepared, version=__version__)
    if detach:
        click.echo(json.dumps({"job": folder.id}) if options.json else folder.id)
        return 0
    options.say(f"job {folder.id}: {folder.path}")
    return _end(options, folder, follow_training(options, folder))


def _prepare(options: Options, recipe: Path, overrides: tuple[str, ...]) -> Prepared:
    from launch import start

    return start.prepare_file(recipe, overrides, options.inventory())


def _show(options: Options, prepared: Prepared) -> None:
    if options.json:
        if click.get_current_context().info_name == "plan" or click.get_current_context().params.get("dry_run"):
            click.echo(json.dumps(_document(prepared), indent=1))
        return
    if options.quiet:
        return
    from sparkctl import show

    click.echo(show.banner(prepared.inventory, ranks=len(prepared.plan.ranks)))
    click.secho(show.title(prepared), bold=True)
    show.print_table(show.plan_table(prepared))


def _document(prepared: Prepared) -> dict[str, object]:
    return {
        "name": prepared.recipe.name,
        "model": str(prepared.card.folder),
        "parameters": prepared.card.parameters,
        "bytes": prepared.card.total_bytes,
        "strategy": prepared.plan.strategy,
        "embedded": prepared.inventory.embedded,
        "ranks": [
            {"rank": r.rank, "node": r.node, "start": r.cut.start, "end": r.cut.end, "weight_bytes": r.weight_bytes}
            for r in prepared.plan.ranks
        ],
    }


def follow_training(options: Options, folder: JobFolder) -> JobState | None:
    """Show a fine-tune until it has ended; None when the user looked away before."""
    from launch.follow import follow
    from sparkctl.show import TrainingView

    state = None
    try:
        with TrainingView(folder.id, quiet=options.quiet or options.json) as view:
            for update in follow(folder, folder.metrics):
                state = update.state
                view.state(state.state)
                view.entries(update.entries)
    except KeyboardInterrupt:
        click.echo(f"\ndetached; the job goes on. sparkctl logs -f {folder.id} | sparkctl stop {folder.id}", err=True)
        return None
    return state


def _end(options: Options, folder: JobFolder, state: JobState | None) -> int:
    from launch import job

    if options.json:
        document = {
            "job": folder.id,
            "state": (state or folder.state()).state,
            "folder": str(folder.path),
            "last": job.last_metrics(folder),
        }
        click.echo(json.dumps(document, indent=1))
    if state is None:
        return 0
    if state.state == "failed":
        raise failure(folder, state)
    if state.state == "stopped":
        options.say(f"job {folder.id} was stopped")
        return 1
    result = folder.adapter if folder.adapter.is_dir() else folder.model
    if options.quiet and not options.json:
        click.echo(result)
    options.say(f"result       {result}")
    options.say(f"TensorBoard  {folder.tensorboard}")
    options.say(f'next         sparkctl ask {folder.id} "your question"')
    return 0


def failure(folder: JobFolder, state: JobState) -> Exception:
    """A failed job as an error: the agent's words, and before them the last lines of the rank they are about."""
    from cluster.errors import FailedError, WrongInputError
    from launch.follow import last_lines

    if state.wrong_input:  # the rank's own last words are the reason
        return WrongInputError(f"job {folder.id} failed: {state.reason}", state.fix)
    if state.failed_rank is not None:
        for text in last_lines(folder.log(state.failed_rank)):
            click.echo(click.style(f"  rank {state.failed_rank} | ", dim=True) + text, err=True)
    return FailedError(f"job {folder.id} failed: {state.reason}", state.fix)
