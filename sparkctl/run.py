"""`plan` and `run`: a recipe is shown, started and followed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparkctl import __version__
from sparkctl.options import Options, common

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.errors import SparkctlError
    from launch.handle import JobHandle, PairHandle
    from launch.inference.request import Request
    from launch.job import JobState
    from launch.start import Prepared

_recipe = click.argument("recipe", type=click.Path(path_type=Path))
_overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a key of the recipe; may be repeated."
)


@click.command()
@_recipe
@_overrides
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GiB",
    help="Ask about boxes of this size (a DGX Spark has 121.7), otherwise like a DGX Spark.",
)
@common
def plan(options: Options, recipe: Path, overrides: tuple[str, ...], memory: float | None) -> int:
    """Show whether the model of RECIPE fits, who holds what, and how fast it will be; nothing is started.

    The weights need not be there: a folder with config.json, here or on a node, or a model on the hub, will do.

    Exit status 3: it does not fit.
    """
    from cluster import record
    from launch import start

    inventory = options.inventory()
    if inventory.embedded or record.load(inventory) is None:
        prepared = start.survey_file(recipe, overrides, inventory, memory=memory)
    else:
        with options.pair() as pair:
            prepared = start.survey_file(recipe, overrides, inventory, pair, memory=memory)
    _show_all(options, prepared, asked=memory)
    return 0 if prepared.plan.fits else 3


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@_overrides
@click.option("--again", metavar="JOB", help="In place of a recipe: repeat a job exactly.")
@click.option("--detach", is_flag=True, help="Start, print the job's id and return.")
@click.option("--dry-run", is_flag=True, help="Check and plan, start nothing.")
@click.option(
    "--force",
    is_flag=True,
    help="Run all the same where the plan says that it does not fit, or the link was measured below its bar.",
)
@common
def run(
    options: Options,
    recipe: Path | None,
    overrides: tuple[str, ...],
    again: str | None,
    detach: bool,
    dry_run: bool,
    force: bool,
) -> int:
    """Run RECIPE on the pair: check it, plan it, start it, follow it. Ctrl-C detaches; the job goes on."""
    from launch import recipe as recipes
    from launch import start
    from launch.recipe import CommandRecipe, FinetuneRecipe, InferenceRecipe

    if (recipe is None) == (again is None) or (again is not None and (overrides or dry_run)):
        raise click.UsageError("give a RECIPE, or --again JOB and nothing of a recipe")
    if recipe is None:
        return _again(options, str(again), detach=detach, force=force)
    wanted = recipes.load(recipe, overrides, must_exist=True)
    if isinstance(wanted, CommandRecipe):
        from sparkctl.program import run_command

        return run_command(options, wanted, str(recipe), detach=detach, dry_run=dry_run, force=force)
    with options.pair() as pair:
        prepared = start.prepare_file(recipe, overrides, pair.inventory, pair, force=force)
        if dry_run:
            _show_all(options, prepared)
            return 0
        if not detach:
            _show(options, prepared)
        if len(prepared.plan.ranks) > 1 and not force:
            pair.connect()
            pair.refuse_bad_link()
        if isinstance(prepared.recipe, FinetuneRecipe) and not detach:
            _tell_of_the_one_before(options, prepared, pair)
        job = started(options, prepared, pair)
        if detach:
            click.echo(json.dumps({"job": job.id}) if options.json else job.id)
            return 0
        options.say(f"job {job.id}: {job.folder}")
        if isinstance(prepared.recipe, InferenceRecipe):
            return _served(options, pair, job)
        return _end(options, job, follow_training(options, job))


def _tell_of_the_one_before(options: Options, prepared: Prepared, pair: PairHandle) -> None:
    from launch import again

    before = again.finished_before(prepared.recipe, pair.rows()[0])
    if before is not None:
        options.say(f"job {before} has finished this recipe already; this starts a new one")


def _again(options: Options, given: str, *, detach: bool, force: bool) -> int:
    from launch import again

    with options.pair() as pair:
        old = pair.find(given).spec
        if len(old.ranks) > 1 and not force:
            pair.refuse_bad_link()
        job = again.start(old, pair, version=__version__, force=force)
        if detach:
            click.echo(json.dumps({"job": job.id}) if options.json else job.id)
            return 0
        return follow_any(options, pair, job)


def follow_any(options: Options, pair: PairHandle, job: JobHandle) -> int:
    """Show a job of whatever kind until it has ended, or the user looks away; the exit status."""
    from sparkctl.program import follow_program

    options.say(f"job {job.id}: {job.folder}")
    if job.spec.recipe["kind"] == "finetune":
        return _end(options, job, follow_training(options, job))
    if job.spec.recipe["kind"] == "inference" and not job.spec.requests:
        return _served(options, pair, job)
    return follow_program(options, job)


def started(
    options: Options, prepared: Prepared, pair: PairHandle, requests: Sequence[Request] = (), *, quiet: bool = False
) -> JobHandle:
    """Start a job, and show what has to be copied for it."""
    from launch import start
    from sparkctl.carrying import CarryingView

    with CarryingView(quiet=quiet or options.quiet or options.json) as view:
        return start.start(prepared, pair, version=__version__, requests=requests, watch=view)


def _show(options: Options, prepared: Prepared) -> None:
    if options.quiet or options.json:
        return
    from sparkctl import planview, show

    click.echo(show.banner(prepared.inventory, ranks=len(prepared.plan.ranks)))
    click.secho(show.title(prepared), bold=True)
    show.print_table(show.plan_table(prepared))
    if prepared.plan.choice is not None:
        planview.print_choice(prepared.plan.choice)


def _show_all(options: Options, prepared: Prepared, *, asked: float | None = None) -> None:
    from sparkctl import planview, show

    if options.json:
        click.echo(json.dumps(planview.document(prepared), indent=1))
    elif not options.quiet:
        ranks = len(prepared.plan.ranks)
        click.echo(show.banner(prepared.inventory, ranks=ranks) if asked is None else show.ASKED.format(asked, ranks))
        click.secho(planview.title(prepared), bold=True)
        planview.print_plan(prepared)


def follow_training(options: Options, job: JobHandle) -> JobState | None:
    """Show a fine-tune until it has ended; None when the user looked away before."""
    from launch.follow import follow
    from sparkctl.show import TrainingView

    state = None
    try:
        with TrainingView(job.id, quiet=options.quiet or options.json) as view:
            for update in follow(job, "metrics.jsonl", lost=tell_lost):
                if state is None or update.state.reason != state.reason:
                    view.note(update.state)
                state = update.state
                view.state(state.state)
                view.entries(update.entries)
        summary = view.summary()
        if summary is not None and state is not None and state.state == "succeeded":
            for line in summary.lines():
                options.say(line)
    except KeyboardInterrupt:
        click.echo(f"\ndetached; the job goes on. sparkctl logs -f {job.id} | sparkctl stop {job.id}", err=True)
        return None
    return state


def _served(options: Options, pair: PairHandle, job: JobHandle) -> int:
    from sparkctl import serving

    state = serving.follow(options, pair, job)
    if state is not None and state.state == "failed":
        raise failure(job, state)
    if state is not None:
        options.say(f"job {job.id} has ended: {state.reason or state.state}")
    return 0


def tell_lost(error: SparkctlError) -> None:
    """Say that a node cannot be reached; the job goes on all the same."""
    click.echo(f"{error.message}; the job goes on, and this looks again and again", err=True)


def _end(options: Options, job: JobHandle, state: JobState | None) -> int:
    if options.json:
        document = {
            "job": job.id,
            "state": (state or job.state()).state,
            "folder": job.folder,
            "last": last_step(job),
        }
        click.echo(json.dumps(document, indent=1))
    if state is None:
        return 0
    if state.state == "failed":
        raise failure(job, state)
    if state.state == "stopped":
        options.say(f"job {job.id} was stopped")
        return 1
    result = job.path("adapter" if job.contents("adapter") else "model")
    if options.quiet and not options.json:
        click.echo(result)
    where = "" if job.spec.embedded else f"  (on {job.head.name})"
    options.say(f"result       {result}{where}")
    options.say(f"TensorBoard  {job.path('tensorboard')}{where}")
    options.say(f'next         sparkctl ask {job.id} "your question"')
    return 0


def last_step(job: JobHandle) -> Mapping[str, Any]:
    """The newest logged training step, or nothing."""
    rows = job.head.ask("list")["jobs"]
    found: Mapping[str, Any] = next((row.get("last", {}) for row in rows if row["id"] == job.id), {})
    return found


def failure(job: JobHandle, state: JobState) -> Exception:
    """A failed job as an error: the agent's words, and before them the last lines of the rank they are about."""
    from cluster.errors import FailedError, WrongInputError
    from launch.follow import last_lines

    if state.wrong_input:  # the rank's own last words are the reason
        return WrongInputError(f"job {job.id} failed: {state.reason}", state.fix)
    if state.failed_rank is not None:
        with contextlib.suppress(FailedError):  # its node may be what has failed
            for text in last_lines(job, state.failed_rank):
                click.echo(click.style(f"  rank {state.failed_rank} | ", dim=True) + text, err=True)
    return FailedError(f"job {job.id} failed: {state.reason}", state.fix)
