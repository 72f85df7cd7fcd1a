"""Where an agent begins: which side of the job this node is, what was handed to it, and what its end means."""

from __future__ import annotations

import contextlib
import json
import os
import select
from collections.abc import Mapping
from pathlib import Path

from cluster import environ
from cluster.errors import SparkctlError
from launch.agent import stop
from launch.agent.deputy import Deputy
from launch.agent.ledger import Ledger
from launch.agent.supervise import Supervisor
from launch.agent.unit import Unit
from launch.agent.watch import Verdict
from launch.job import JobFolder

# Whoever starts an agent in a unit hands it the secrets right after.
SECRETS_WITHIN = 20.0


def main(path: str) -> int:
    """Be the agent of the job whose folder is given."""
    os.umask(0o077)  # of the ranks too: a job's files are for the owner's eyes only
    folder, unit = JobFolder(Path(path)), Unit.ours()
    with folder.supervising():
        stop.listen(unit)
        state = folder.written()
        if state.ended:  # it was told to come back after its job's end: a node that was off meanwhile
            unit.disable()
            return 0
        try:
            _serve(folder, unit)
        except (stop.Leaving, stop.StopAsked):
            return 0
        except BaseException as error:
            Ledger(folder).change(
                state="failed",
                reason=error.message if isinstance(error, SparkctlError) else f"the agent failed: {error}",
                fix=(error.fix if isinstance(error, SparkctlError) else "") or f"look at {folder.agent_log}",
            )
            unit.disable()
            raise
    return 0


def _serve(folder: JobFolder, unit: Unit) -> None:
    spec = folder.spec()
    obeys = spec.link is not None and folder.node() != spec.ranks[0].node
    try:
        secrets = _secrets(folder, spec.secrets)
    except SecretsGoneError as error:  # the other node must not wait for a rank that cannot start
        if obeys:
            Deputy(folder, {}, unit, lost=error.message).run()
        else:
            Supervisor(folder, {}, unit).give_up(Verdict("failed", error.message, error.fix))
        return
    if obeys:
        Deputy(folder, secrets, unit).run()
        return
    Supervisor(folder, secrets, unit).run()


def _secrets(folder: JobFolder, names: tuple[str, ...]) -> Mapping[str, str]:
    """The secrets of the inventory's `env`: from the environment, or through the pipe in the job's folder, where nothing stays.

    Raises:
        SecretsGoneError: they were handed over once, and this agent has come back since.
    """
    given = environ.secrets_of(os.environ)
    if set(names) <= set(given):
        return given
    with contextlib.suppress(OSError):
        # Whoever has made the pipe takes it away again.
        return {**given, **_read(os.open(folder.secrets_pipe, os.O_RDONLY | os.O_NONBLOCK))}
    raise SecretsGoneError(folder, names)


class SecretsGoneError(SparkctlError):
    """They are kept in memory alone."""

    def __init__(self, folder: JobFolder, names: tuple[str, ...]) -> None:
        what = f"{', '.join(names)} {'was' if len(names) == 1 else 'were'}"
        super().__init__(
            f"node {folder.node()}: the inventory's {what} only in the memory of the agent, which had to start anew",
            f"`sparkctl resume {folder.id}` hands over what is needed, and goes on",
        )


def _read(descriptor: int) -> dict[str, str]:
    data = b""
    with os.fdopen(descriptor, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], SECRETS_WITHIN)[0]:
            piece = pipe.read(65536)
            if piece:
                data += piece
            elif data:
                break
    return {str(name): str(value) for name, value in json.loads(data or b"{}").items()}
