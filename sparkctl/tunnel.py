"""`tunnel`: what a job serves, on this machine's loopback, for programs and a browser."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING

import click

from sparkctl.options import Options, common

if TYPE_CHECKING:
    from collections.abc import Callable

    from launch.handle import JobHandle, PairHandle

# Seconds between two looks whether the job has ended.
POLL = 1.0


@click.command()
@click.argument("job")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="The port on this machine, of the first where there are several. [default: the job's own, else a free one]",
)
@common
def tunnel(options: Options, job: str, port: int | None) -> int:
    """Bring what JOB serves to this machine's loopback, until Ctrl-C.

    The endpoint of a served model (the address of its page holds the job's key), TensorBoard of a fine-tune, also one that has
    ended, or the `ports` of a command recipe.

    It goes on through lost connections and restarts of the job. But for TensorBoard, it ends when the job does.
    """
    with options.pair() as pair:
        found = pair.find(job)
        kind = found.spec.recipe["kind"]
        with contextlib.ExitStack() as open_ways:
            try:
                if kind == "finetune":
                    return _board(options, pair, found, port, open_ways)
                if kind == "command":
                    ended = _ports(options, pair, found, port, open_ways)
                else:
                    ended = _endpoint(options, pair, found, port, open_ways)
            except KeyboardInterrupt:
                options.say("")
                return 0
            options.say(f"job {found.id} has ended: {ended}")
            return 0


def _endpoint(
    options: Options, pair: PairHandle, found: JobHandle, port: int | None, open_ways: contextlib.ExitStack
) -> str:
    from sparkctl.reach import Bridge, endpoint_way, reach

    reached = reach(pair, found)
    bridge = open_ways.enter_context(Bridge(endpoint_way(reached), port))
    page = f"http://127.0.0.1:{bridge.port}/#key={reached.key}"
    base = f"http://127.0.0.1:{bridge.port}/v1"
    if options.json:
        click.echo(json.dumps({"job": found.id, "base_url": base, "api_key": reached.key, "page": page}))
    else:
        options.say(f"job {found.id} on this machine, until Ctrl-C\n")
        click.echo(f"page      {page}")
        click.echo(f"base URL  {base}")
        click.echo(f"key       {reached.key}")
    return _watch(found)


def _board(
    options: Options, pair: PairHandle, found: JobHandle, port: int | None, open_ways: contextlib.ExitStack
) -> int:
    """TensorBoard, which runs on the head as long as this does."""
    from sparkctl.reach import Bridge, way_to

    path = str(found.head.ask("board", id=found.id)["path"])
    way = way_to(pair, found, lambda: int(found.head.ask("board", id=found.id)["port"]))
    bridge = open_ways.enter_context(Bridge(way, port))
    url = f"http://127.0.0.1:{bridge.port}{path}/"
    if options.json:
        click.echo(json.dumps({"job": found.id, "tensorboard": url}))
    else:
        options.say(f"job {found.id} on this machine, until Ctrl-C\n")
        click.echo(f"TensorBoard  {url}")
    while True:
        time.sleep(3600)


def _ports(
    options: Options, pair: PairHandle, found: JobHandle, port: int | None, open_ways: contextlib.ExitStack
) -> str:
    from cluster.errors import FailedError, RefusedError
    from launch.handle import LocalNode
    from sparkctl.reach import Bridge, way_to

    wanted = [int(one) for one in found.spec.recipe.get("ports", ())]
    if not wanted:
        raise RefusedError(f"job {found.id} names no ports", "put `ports: [8888]` into its recipe")
    state = found.state()
    if state.state == "failed":
        raise FailedError(f"job {found.id} failed: {state.reason}", state.fix)
    if state.ended:
        raise RefusedError(f"job {found.id} is {state.state}", f"sparkctl run --again {found.id}")
    ways = {}
    for number, there in enumerate(wanted):
        chosen = port if number == 0 else None
        if chosen is None and isinstance(found.head, LocalNode):
            ways[there] = there  # the node's loopback is this machine's
            continue
        bridge = open_ways.enter_context(Bridge(way_to(pair, found, _always(there)), chosen, prefer=there))
        ways[there] = bridge.port
    if options.json:
        document = {str(there): f"http://127.0.0.1:{here}/" for there, here in ways.items()}
        click.echo(json.dumps({"job": found.id, "ports": document}))
    else:
        options.say(f"job {found.id} on this machine, until Ctrl-C\n")
        for there, here in ways.items():
            click.echo(f"port {there:<6} http://127.0.0.1:{here}/")
    return _watch(found)


def _always(port: int) -> Callable[[], int]:
    return lambda: port


def _watch(job: JobHandle) -> str:
    """Wait for the job's end; returns how it came. A head that cannot be reached is looked for again and again."""
    from cluster.errors import FailedError

    while True:
        with contextlib.suppress(FailedError):
            state = job.state()
            if state.ended:
                return state.reason or state.state
        time.sleep(POLL)
