"""`bench serve`: what a served model gives under a load of one's own choosing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from sparkctl.options import Options, common

if TYPE_CHECKING:
    from launch.inference.load import Result


@click.command()
@click.argument("job")
@click.option("--requests", type=click.IntRange(1, 100_000), default=32, show_default=True, help="How many to send.")
@click.option(
    "--rate", type=click.FloatRange(min=0), default=0.0, help="Requests/s, at random moments; 0 waits for answers."
)
@click.option(
    "--concurrency", type=click.IntRange(1, 512), help="How many at once at most. [default: 8; with --rate 256]"
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--answer-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--model", help="One of the job's models; by default the base model.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed sends the same.")
@common
def serve(
    options: Options,
    job: str,
    requests: int,
    rate: float,
    concurrency: int | None,
    prompt_tokens: int,
    answer_tokens: int,
    model: str | None,
    seed: int,
) -> None:
    """Send requests to the served JOB and tell what they took: throughput, and percentiles of the waits."""
    from launch.inference import load
    from launch.inference.load import Load
    from sparkctl.reach import reaching

    wanted = Load(requests, concurrency or (256 if rate else 8), rate, prompt_tokens, answer_tokens, seed)
    with reaching(options, job) as reached:
        result = load.run(reached.client(), reached.model(model), wanted, progress=_progress(options, requests))
    if options.json:
        click.echo(json.dumps(result.document(), indent=1))
    else:
        _print(options, result)


def _progress(options: Options, total: int) -> Callable[[int], None]:
    live = not options.json and not options.quiet and sys.stderr.isatty()

    def show(done: int) -> None:
        if live:
            click.echo(f"\r{done}/{total} answered" + ("\n" if done == total else ""), nl=False, err=True)

    return show


def _print(options: Options, result: Result) -> None:
    from rich.table import Table

    from sparkctl.show import print_table

    load = result.load
    how = f"{load.rate:g} requests/s" if load.rate else f"{min(load.concurrency, load.requests)} at once"
    options.say(f"{load.requests} requests, {how}, {load.prompt_tokens} tokens each and {load.answer_tokens} in answer")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for share in result.first_token:
        table.add_column(f"p{share}", justify="right")
    for name, figures in (
        ("time to first token", result.first_token),
        ("time per token", result.per_token),
        ("whole answer", result.whole),
    ):
        table.add_row(name, *(_seconds(value) for value in figures.values()))
    print_table(table)
    click.echo(
        f"throughput  {result.requests_per_s:.2f} requests/s, {result.tokens_per_s:.1f} tokens/s, "
        f"{result.prompt_tokens_per_s:.1f} prompt tokens/s, over {result.seconds:.1f} s"
    )
    if result.failed:
        click.echo(f"failed      {result.failed} of {load.requests}: {result.first_failure}")


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
