"""The endpoint's life in the process of rank 0: it listens before the model is loaded, answers, drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from cluster.errors import WrongInputError
from launch.agent.report import Report, Reporter
from launch.inference.endpoint import Endpoint, key_of
from launch.inference.server.app import application
from launch.inference.server.guard import Door
from launch.inference.server.service import Service
from launch.job import JobFolder

# Seconds that answers which are being written may take to end once a stop was asked for.
DRAIN_WITHIN = 30.0
POLL = 0.1


def listen(host: str, port: int) -> socket.socket:
    """A socket bound before anything is loaded, so that a taken port is told at once.

    Raises:
        WrongInputError: the address is not this node's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        fix = "set `port: 0` to take any free one" if error.errno == 98 else "set `host: 127.0.0.1`"
        raise WrongInputError(f"the endpoint cannot listen on {host}:{port}: {error.strerror}", fix) from None
    return listener


def listen_again(host: str, port: int, folder: JobFolder) -> socket.socket:
    """As `listen`; where any port will do, the one that an earlier attempt of the job had, so that its clients find it again."""
    before = Endpoint.read(folder.path) if port == 0 else None
    if before is not None:
        with contextlib.suppress(WrongInputError):  # somebody else has it by now
            return listen(host, before.port)
    return listen(host, port)


def serve(listener: socket.socket, service: Service, folder: JobFolder, reporter: Reporter) -> None:
    """Answer until the agent asks for a stop, or the engine is gone; then drain: nothing new is taken, what runs may end.

    Call it from the main thread. The agent is told as soon as requests are answered.
    """
    asyncio.run(_serve(listener, service, folder, reporter))


async def _serve(listener: socket.socket, service: Service, folder: JobFolder, reporter: Reporter) -> None:
    host, port = listener.getsockname()[:2]
    door = Door(key_of(folder.key()), frozenset({host}))
    server = _Server(
        uvicorn.Config(
            application(service, door),
            access_log=False,
            log_level="warning",
            lifespan="off",
            server_header=False,
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=64 << 10,
        )
    )
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    Endpoint(host, port, service.names).write(folder.path)
    reporter.tell(Report("ready"))
    while not reporter.stop_asked and service.alive() and not running.done():
        await asyncio.sleep(POLL)
    await service.drain(DRAIN_WITHIN)
    server.should_exit = True
    await running


class _Server(uvicorn.Server):
    """Leaves signals to others: the agent's first one drains, and does not close."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
