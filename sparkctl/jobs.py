"""`jobs`, `logs`, `stop`: what runs, what it says, and its end."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from sparkctl.options import Options, common

if TYPE_CHECKING:
    from launch.job import JobFolder

# The agent gives its ranks 4 s before it kills them.
STOP_WITHIN = 15.0


@dataclass(frozen=True)
class _Row:
    """A job in the list."""

    id: str
    state: str
    kind: str = ""
    created: str = ""
    updated: str = ""
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    reason: str = ""

    @classmethod
    def of(cls, folder: JobFolder) -> _Row:
        """Read the job's files. A damaged folder is a row too: one must not hide the others."""
        from cluster.errors import FailedError
        from launch import job

        try:
            spec, state = folder.spec(), folder.state()
        except FailedError as error:
            return cls(folder.id, "damaged", reason=error.message)
        last = job.last_metrics(folder)
        return cls(
            folder.id,
            state.state,
            str(spec.recipe["kind"]),
            spec.created,
            state.updated,
            last.get("step"),
            last.get("total_steps"),
            last.get("loss"),
            state.reason,
        )


@click.command()
@click.option("--all", "show_all", is_flag=True, help="Also those that ended more than a day ago.")
@common
def jobs(options: Options, show_all: bool) -> None:
    """List the jobs of this machine, newest last."""
    from launch import job

    listed = [_Row.of(folder) for folder in job.folders()]
    if not show_all:
        listed = [row for row in listed if row.state not in job.ENDED or job.age(row.updated) < 86400]
    if options.json:
        click.echo(json.dumps([asdict(row) for row in listed], indent=1))
        return
    if not listed:
        options.say("no jobs; `sparkctl run RECIPE` starts one")
        return
    from rich.table import Table

    from sparkctl.show import cut_short, print_table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("job", "state", "kind", "step", "loss", "age"):
        table.add_column(name, justify="right" if name in ("step", "loss", "age") else "left", no_wrap=True)
    table.add_column("")
    for row in listed:
        table.add_row(
            row.id,
            row.state,
            row.kind,
            "" if row.step is None else f"{row.step}/{row.total_steps}",
            "" if row.loss is None else f"{row.loss:.3f}",
            _words(job.age(row.created)) if row.created else "",
            cut_short(row.reason.partition("\n")[0]),
        )
    print_table(table)


@click.command()
@click.argument("job")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the job has ended.")
@click.option("--rank", type=click.IntRange(min=0), help="Only this rank.")
@common
def logs(options: Options, job: str, following: bool, rank: int | None) -> None:
    """Print what the ranks of JOB printed, each line with its rank."""
    from cluster.errors import WrongInputError
    from launch import job as jobs_of
    from launch.follow import POLL, Tail

    folder = jobs_of.find(job)
    ranks = [spec.rank for spec in folder.spec().ranks]
    if rank is not None and rank not in ranks:
        raise WrongInputError(
            f"--rank {rank}: job {folder.id} has ranks {ranks[0]} to {ranks[-1]}", f"sparkctl logs {folder.id}"
        )
    tails = {number: Tail(folder.log(number)) for number in ranks if rank in (None, number)}
    collected: list[dict[str, object]] = []
    while True:
        ended = folder.state().ended
        for number, tail in tails.items():
            for text in tail.rest() if ended else tail.lines():
                if options.json:
                    collected.append({"rank": number, "line": text})
                else:
                    click.echo(click.style(f"rank {number} | ", dim=True) + text)
        if ended or not following:
            break
        time.sleep(POLL)
    if options.json:
        click.echo(json.dumps(collected, indent=1))


@click.command()
@click.argument("job")
@common
def stop(options: Options, job: str) -> int:
    """End JOB: its agent asks each rank, and kills those that do not listen."""
    from launch import job as jobs_of

    folder = jobs_of.find(job)
    before = folder.state()
    if before.ended:
        options.say(f"job {folder.id} has ended already: {before.state}")
    else:
        end(folder)
        options.say(f"job {folder.id}: {folder.state().state}")
    if options.json:
        click.echo(json.dumps({"job": folder.id, "state": folder.state().state}))
    return 0


def end(folder: JobFolder) -> None:
    """Ask the job's agent to end it, and wait until nothing of it runs.

    Raises:
        FailedError: it did not end in time.
    """
    from cluster.errors import FailedError
    from launch.follow import POLL

    asked: int | None = None
    deadline = time.monotonic() + STOP_WITHIN
    while time.monotonic() < deadline:
        state = folder.state()
        if state.ended and not folder.supervised():
            return
        # The agent holds its lock while it lives, so the process of this number is the agent and no later one.
        if asked is None and state.agent_pid is not None and folder.supervised():
            asked = state.agent_pid
            os.kill(asked, signal.SIGTERM)
        time.sleep(POLL)
    raise FailedError(
        f"job {folder.id} did not end within {STOP_WITHIN:g} s (agent process {asked})", f"look at {folder.agent_log}"
    )


def _words(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"
