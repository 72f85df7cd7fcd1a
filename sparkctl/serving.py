"""How a job that serves looks while `run` follows it: where it answers, how to ask, and how busy it is."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click
from rich.console import Console

from sparkctl.options import Options

if TYPE_CHECKING:
    from launch.handle import JobHandle, PairHandle
    from launch.inference.client import Client
    from launch.inference.endpoint import Endpoint
    from launch.job import JobState

# Seconds between two looks at how busy it is.
LOOK_EVERY = 1.0


def follow(options: Options, pair: PairHandle, job: JobHandle) -> JobState | None:
    """Wait until the job answers, say how to ask it, and go on until it ends; None when the user looked away before.

    With --json that is one document, printed as soon as the job answers, or has ended before it did.
    """
    try:
        return _follow(options, pair, job)
    except KeyboardInterrupt:
        click.echo(f"\ndetached; the job goes on. sparkctl logs -f {job.id} | sparkctl stop {job.id}", err=True)
        return None


def _follow(options: Options, pair: PairHandle, job: JobHandle) -> JobState | None:
    from launch.follow import pause
    from sparkctl.reach import endpoint_of, reach

    console = Console(highlight=False, markup=False, emoji=False)
    live = console.is_terminal and not options.quiet and not options.json
    client = None
    with console.status("starting", spinner="dots") if live else _Silent() as shown:
        while True:
            state = job.state()
            if state.state == "ready" and client is None and endpoint_of(job) is not None:
                reached = reach(pair, job)
                client = reached.client()
                _introduce(options, job, reached.endpoint)
                if options.json:
                    return None
            if state.ended:
                if options.json:
                    _document(job, state.state, None)
                return state
            shown.update("loading the model" if client is None else _busy(client))
            time.sleep(pause(job) if client is None else LOOK_EVERY)


class _Silent:
    """Where no terminal is, nothing moves."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, _: str) -> None:
        """Show nothing."""


def _introduce(options: Options, job: JobHandle, endpoint: Endpoint) -> None:
    if options.json:
        _document(job, "ready", endpoint)
        return
    if options.quiet:
        click.echo(endpoint.base_url)
        return
    click.echo(f"ready        {endpoint.base_url}, models: {', '.join(endpoint.models)}")
    click.echo(f'ask          sparkctl ask {job.id} "your question" | sparkctl chat {job.id}')
    click.echo(f"page, key    sparkctl tunnel {job.id}")


def _document(job: JobHandle, state: str, endpoint: Endpoint | None) -> None:
    document = {
        "job": job.id,
        "state": state,
        "folder": job.folder,
        "base_url": None if endpoint is None else endpoint.base_url,
        "models": [] if endpoint is None else list(endpoint.models),
    }
    click.echo(json.dumps(document, indent=1))


def _busy(client: Client) -> str:
    from cluster.errors import SparkctlError

    try:
        figures = client.figures()
    except SparkctlError:
        return "serving"
    running, waiting = figures.get("sparkctl_requests_running", 0), figures.get("sparkctl_requests_waiting", 0)
    tokens = figures.get("sparkctl_generated_tokens_total", 0)
    return f"serving: {running:g} running, {waiting:g} waiting, {tokens:,.0f} tokens so far"
