"""`tunnel`: a served model on this machine's loopback, for programs and a browser."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING

import click

from sparkctl.options import Options, common

if TYPE_CHECKING:
    from launch.handle import JobHandle

# Seconds between two looks whether the job has ended.
POLL = 1.0


@click.command()
@click.argument("job")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="The port on this machine. [default: the job's own, else a free one]"
)
@common
def tunnel(options: Options, job: str, port: int | None) -> int:
    """Bring the endpoint of the served JOB to this machine's loopback, until Ctrl-C; the address holds the job's key.

    It goes on through lost connections and restarts of the job, and ends when the job does.
    """
    from sparkctl.reach import Bridge, reaching

    with reaching(options, job) as reached, Bridge(reached, port) as bridge:
        page = f"http://127.0.0.1:{bridge.port}/#key={reached.key}"
        base = f"http://127.0.0.1:{bridge.port}/v1"
        if options.json:
            click.echo(json.dumps({"job": reached.job.id, "base_url": base, "api_key": reached.key, "page": page}))
        else:
            options.say(f"job {reached.job.id} on this machine, until Ctrl-C\n")
            click.echo(f"page      {page}")
            click.echo(f"base URL  {base}")
            click.echo(f"key       {reached.key}")
        try:
            ended = _watch(reached.job)
        except KeyboardInterrupt:
            options.say("")
            return 0
        options.say(f"job {reached.job.id} has ended: {ended}")
        return 0


def _watch(job: JobHandle) -> str:
    """Wait for the job's end; returns how it came. A head that cannot be reached is looked for again and again."""
    from cluster.errors import FailedError

    while True:
        with contextlib.suppress(FailedError):
            state = job.state()
            if state.ended:
                return state.reason or state.state
        time.sleep(POLL)
