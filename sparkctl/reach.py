"""From a job's name to someone who answers: what `ask`, `chat`, `tunnel` and `bench serve` begin with."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cluster.transport.tunnel import Tunnel
    from launch.handle import JobHandle, PairHandle
    from launch.inference.client import Client
    from launch.inference.endpoint import Endpoint
    from sparkctl.options import Options

# Seconds that a server may take to get ready.
READY_WITHIN = 900.0


@dataclass(frozen=True)
class Reached:
    """A served job, and the way to it from here."""

    pair: PairHandle
    job: JobHandle
    endpoint: Endpoint
    key: str

    def client(self) -> Client:
        """Whom to ask, at a port of this machine."""
        from launch.inference.client import Client

        host, port = self.address(self.endpoint)
        return Client(host, port, self.key)

    def address(self, endpoint: Endpoint) -> tuple[str, int]:
        """Where an endpoint of the head is to be reached from here: through SSH where the head is another machine."""
        from launch.handle import LocalNode

        if isinstance(self.job.head, LocalNode):
            return endpoint.host, endpoint.port
        return "127.0.0.1", self.pair.transport(self.job.head.name).forward(endpoint.port)

    def model(self, wanted: str | None) -> str:
        """The model to name in requests.

        Raises:
            WrongInputError: the job serves no such model.
        """
        from cluster.errors import WrongInputError

        if wanted is None:
            return self.endpoint.models[0]
        if wanted not in self.endpoint.models:
            raise WrongInputError(
                f"--model {wanted}: job {self.job.id} serves {', '.join(self.endpoint.models)}", "choose one of those"
            )
        return wanted


@contextmanager
def reaching(options: Options, job: str) -> Iterator[Reached]:
    """A served job, as long as the block runs; one that is still loading is waited for.

    Raises:
        WrongInputError: no such job. RefusedError: it serves nothing, or has ended. FailedError: it has failed.
    """
    with options.pair() as pair:
        yield reach(pair, pair.find(job))


@contextmanager
def talking(options: Options, job: str) -> Iterator[Reached]:
    """A served job; or what a fine-tune made, served as long as the block runs.

    Raises:
        WrongInputError: no such job. RefusedError: it has no result, serves nothing, or has ended. FailedError: it has failed.
    """
    with options.pair() as pair:
        found = pair.find(job)
        if found.spec.recipe["kind"] == "finetune":
            with _served(options, pair, found) as reached:
                yield reached
        else:
            yield reach(pair, found)


@contextmanager
def _served(options: Options, pair: PairHandle, tuned: JobHandle) -> Iterator[Reached]:
    from launch import questions, start
    from sparkctl import jobs, run

    wanted = questions.recipe_for(tuned).model_copy(update={"port": 0})  # 8000 may be another server's
    prepared = start.prepare(wanted, pair.inventory, pair, source=tuned.id)
    if not (options.quiet or options.json):
        click.secho(f"loading what job {tuned.id} made; it is served until you leave", dim=True, err=True)
    server = run.started(options, prepared, pair)
    try:
        yield reach(pair, server)
    finally:
        state = jobs.end(server, now=True)
        if state.state in ("succeeded", "stopped"):  # else its logs tell why
            jobs.wait_until_gone(server)
            server.remove()


def reach(pair: PairHandle, job: JobHandle) -> Reached:
    """The same for a job that is known.

    Raises:
        RefusedError: it serves nothing, or has ended. FailedError: it has failed.
    """
    from cluster.errors import FailedError, RefusedError
    from launch.follow import pause
    from launch.inference.endpoint import key_of

    kind = job.spec.recipe["kind"]
    if kind != "inference":
        raise RefusedError(
            f"job {job.id} serves nothing (kind: {kind})",
            "run a recipe of kind: inference; `sparkctl chat` and `ask` take fine-tuned jobs too",
        )
    deadline = time.monotonic() + READY_WITHIN
    while True:
        state, files = job.look({"key": 0})
        endpoint = endpoint_of(job) if state.state == "ready" else None
        if endpoint is not None:
            return Reached(pair, job, endpoint, key_of(files["key"].decode().strip()))
        if state.state == "failed":
            raise FailedError(f"job {job.id} failed: {state.reason}", state.fix)
        if state.ended:
            raise RefusedError(f"job {job.id} is {state.state}", "run its recipe again")
        if time.monotonic() > deadline:
            raise RefusedError(f"job {job.id} is {state.state}, not ready yet", f"sparkctl logs -f {job.id}")
        time.sleep(pause(job))


def endpoint_of(job: JobHandle) -> Endpoint | None:
    """Where it answers; None as long as it has not said so."""
    from launch.inference import endpoint

    told = job.look({endpoint.FILE: 0})[1][endpoint.FILE]
    return endpoint.Endpoint.parse(told, job.path(endpoint.FILE)) if told else None


def endpoint_way(reached: Reached) -> Callable[[], socket.socket]:
    """The way to a served job: found anew where it was lost, as the job may have been restarted, on another port."""
    known: list[tuple[str, int]] = []

    def dial() -> socket.socket:
        if known:
            with contextlib.suppress(OSError):
                return _connect(known[0])
        endpoint = endpoint_of(reached.job)
        assert endpoint is not None
        known[:] = [reached.address(endpoint)]
        return _connect(known[0])

    return dial


def way_to(pair: PairHandle, job: JobHandle, port: Callable[[], int]) -> Callable[[], socket.socket]:
    """The way to a port on the loopback of a job's head; `port` is asked for every connection."""
    from launch.handle import LocalNode

    forwarded: dict[int, int] = {}

    def dial() -> socket.socket:
        there = port()
        if isinstance(job.head, LocalNode):
            return _connect(("127.0.0.1", there))
        if there not in forwarded:
            forwarded[there] = pair.transport(job.head.name).forward(there)
        return _connect(("127.0.0.1", forwarded[there]))

    return dial


class Bridge:
    """A port of this machine's loopback whose connections go the way that `dial` finds.

    Args:
        port: the port; None: any that is free, but `prefer` where that is.

    Raises:
        WrongInputError: the port is taken.
    """

    def __init__(self, dial: Callable[[], socket.socket], port: int | None, *, prefer: int = 0) -> None:
        from cluster.errors import WrongInputError
        from cluster.transport.tunnel import Tunnel

        try:
            self._tunnel = _preferring(dial, prefer) if port is None else Tunnel(dial, port=port)
        except OSError as error:
            reason = (error.strerror or str(error)).partition(" (")[0]
            raise WrongInputError(f"--port {port}: {reason}", "choose another, or leave it out") from None
        self.port = self._tunnel.port

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, *_: object) -> None:
        self._tunnel.close()


def _preferring(dial: Callable[[], socket.socket], port: int) -> Tunnel:
    from cluster.transport.tunnel import Tunnel

    with contextlib.suppress(OSError):
        return Tunnel(dial, port=port)
    return Tunnel(dial)


def _connect(address: tuple[str, int]) -> socket.socket:
    far = socket.create_connection(address, timeout=10)
    far.settimeout(None)  # an answer may be long in coming
    return far
