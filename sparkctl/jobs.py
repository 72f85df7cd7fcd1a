"""`jobs`, `logs`, `stop`: what runs, what it says, and its end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import click

from sparkctl.options import Options, common

if TYPE_CHECKING:
    from datetime import datetime

    from launch.handle import JobHandle, Row
    from launch.job import JobState

# Seconds. The agent gives its ranks 4 s before it kills them, and waits for the other node; those that write a checkpoint or let
# requests end get a minute before that.
STOP_WITHIN = 30.0
GENTLE_WITHIN = 90.0


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
    memory: dict[str, int] = field(default_factory=dict)  # bytes that its ranks hold now, by node
    reason: str = ""
    warning: str = ""
    source: str = ""
    fingerprints: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Row) -> _Row:
        """What a node tells of a job. A damaged folder is a row too: one must not hide the others."""
        from launch import again

        if row.spec is None or row.state is None:
            return cls(row.id, "damaged", reason=row.error)
        return cls(
            row.id,
            row.state.state,
            str(row.spec.recipe["kind"]),
            row.spec.created,
            row.state.updated,
            row.last.get("step"),
            row.last.get("total_steps"),
            row.last.get("loss"),
            dict(row.memory),
            row.state.reason,
            row.state.warning,
            row.spec.source,
            again.fingerprints(row.spec),
        )


@click.command()
@click.option("--all", "show_all", is_flag=True, help="Also those that ended more than a day ago.")
@common
def jobs(options: Options, show_all: bool) -> None:
    """List the jobs of the pair, newest last. With --all, also by which recipe, plan, code and model (short hashes)."""
    from launch.handle import is_recent

    with options.pair() as pair:
        rows, errors = pair.rows()
    if errors and not rows:
        raise errors[0]
    for error in errors:
        click.echo(f"{error.message}: what only that node knows is not shown", err=True)
    listed = [_Row.of(row) for row in rows if show_all or is_recent(row)]
    if options.json:
        click.echo(json.dumps([asdict(row) for row in listed], indent=1))
        return
    if not listed:
        options.say("no jobs; `sparkctl run RECIPE` starts one")
        return
    from rich.table import Table

    from launch.job import age
    from sparkctl.show import cut_short, print_table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("job", "state", "kind", "step", "loss", "memory", "age"):
        table.add_column(name, justify="right" if name in ("step", "loss", "memory", "age") else "left", no_wrap=True)
    table.add_column("")
    for name in ("recipe", "plan", "code", "model") if show_all else ():
        table.add_column(name, no_wrap=True)
    for row in listed:
        table.add_row(
            row.id,
            row.state,
            row.kind,
            "" if row.step is None else f"{row.step}/{row.total_steps}",
            "" if row.loss is None else f"{row.loss:.3f}",
            " + ".join(f"{size / 2**30:.1f}" for size in row.memory.values()) + (" GiB" if row.memory else ""),
            _words(age(row.created)) if row.created else "",
            cut_short((row.reason or row.warning).partition("\n")[0]),
            *((row.fingerprints.get(name, "")[:8] for name in ("recipe", "plan", "code", "model")) if show_all else ()),
        )
    print_table(table)


@click.command()
@click.argument("job")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the job has ended.")
@click.option("--rank", type=click.IntRange(min=0), help="Only this rank.")
@click.option(
    "--since", metavar="TIME", help="Only what came after: 90s, 10m, 2h or 1d ago, or a time as 2026-11-26T08:00."
)
@common
def logs(options: Options, job: str, following: bool, rank: int | None, since: str | None) -> None:
    """Print what the ranks of JOB printed, each line with its rank."""
    from datetime import UTC, datetime

    from cluster.errors import WrongInputError
    from launch import log_times

    begin = None if since is None else log_times.moment(since, datetime.now(UTC))
    with options.pair() as pair:
        found = pair.find(job)
        ranks = [spec.rank for spec in found.spec.ranks]
        if rank is not None and rank not in ranks:
            raise WrongInputError(
                f"--rank {rank}: job {found.id} has ranks {ranks[0]} to {ranks[-1]}", f"sparkctl logs {found.id}"
            )
        collected: list[dict[str, object]] = []
        for number, text in lines(
            found, [one for one in ranks if rank in (None, one)], following=following, since=begin
        ):
            if options.json:
                collected.append({"rank": number, "line": text})
            else:
                click.echo(click.style(f"rank {number} | ", dim=True) + text)
    if options.json:
        click.echo(json.dumps(collected, indent=1))


def lines(
    job: JobHandle, ranks: Sequence[int], *, following: bool, since: datetime | None = None
) -> Iterator[tuple[int, str]]:
    """The lines of these ranks as they come; without `following`, those that are there. `since`: printed after that time."""
    from cluster.errors import FailedError
    from launch.follow import Tail, patiently, pause, skip_before
    from sparkctl.run import tell_lost

    tails = [Tail(job, f"rank{number}.log", number) for number in ranks]
    for tail in tails if since is not None else ():
        with suppress(FailedError):  # its node is away: said below
            assert since is not None
            skip_before(tail, job, since)
    while tails:
        for tail in tuple(tails):
            try:
                # Only the head knows when the job ends; without it, nobody does. Another node may be what it goes on without.
                state, lines = patiently(tail.look, tell_lost) if following and tail.rank == 0 else tail.look()
            except FailedError as error:
                if len(ranks) == 1 or tail.rank == 0:
                    raise
                if not following or job.state().ended:
                    tell_lost(error)
                    tails.remove(tail)
                continue
            yield from ((tail.rank, text) for text in lines)
            if state.ended or not following:
                tails.remove(tail)
        if tails:
            time.sleep(pause(job))


@click.command()
@click.argument("job")
@click.option("--now", is_flag=True, help="Do not wait for a checkpoint, or for requests to be answered.")
@common
def stop(options: Options, job: str, now: bool) -> int:
    """End JOB: it may write a checkpoint or finish its answers first; what does not listen is killed."""
    with options.pair() as pair:
        found = pair.find(job)
        state = found.state()
        if state.ended:
            options.say(f"job {found.id} has ended already: {state.state}")
        else:
            state = end(found, now=now)
            options.say(f"job {found.id}: {state.state}")
    if options.json:
        click.echo(json.dumps({"job": found.id, "state": state.state}))
    return 0


def end(job: JobHandle, *, now: bool) -> JobState:
    """Ask the job's agent to end it, and wait until nothing of it runs.

    Raises:
        FailedError: it did not end in time.
    """
    from cluster.errors import FailedError
    from launch.follow import pause

    job.stop(now=now)
    within = STOP_WITHIN if now else GENTLE_WITHIN
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        state = job.state()
        if state.ended and not job.is_supervised():
            return state
        time.sleep(pause(job))
    raise FailedError(
        f"job {job.id} did not end within {within:g} s", f"look at {job.path('agent.log')} on {job.head.name}"
    )


def wait_until_gone(job: JobHandle) -> None:
    """Wait until the agents of an ended job have gone."""
    from launch.follow import pause

    deadline = time.monotonic() + STOP_WITHIN
    while time.monotonic() < deadline and any(
        node.ask("look", id=job.id, files={})["supervised"] for node in job.nodes
    ):
        time.sleep(pause(job))


def _words(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"
