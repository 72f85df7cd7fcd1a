"""What a node does for a command line: makes a job's folder, starts its agent, tells what became of it, stops it, removes it.

Asked over SSH (`sparkctl orders`: a line of JSON in, a line out, so that no secret is in an argv), or called as it is here.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import environ
from cluster.errors import FailedError, SparkctlError, WrongInputError
from cluster.readings.box import GpuProcess
from cluster.transport.errand import MARK
from cluster.transport.local import LocalTransport
from launch import footprint, job
from launch.agent.unit import name_of
from launch.board import Boards
from launch.box import this_has_gpu, this_memory
from launch.job import JobFolder, JobState
from launch.spec import JobSpec

# Bytes of files that one answer brings.
PIECE = 1 << 20
SECRETS_WITHIN = 20.0
_SYSTEMCTL_SECONDS = 30.0
_BOARDS = Boards()


def create(spec: Mapping[str, Any], key: str, node: str) -> dict[str, Any]:
    """Make the job's folder on this node, `node` of the pair."""
    folder = job.create(JobSpec.model_validate(spec), key, node)
    return {"folder": str(folder.path)}


def start(id: str, secrets: Mapping[str, str], unit: bool) -> dict[str, Any]:
    """Start the job's agent: as a unit of the user's systemd manager where `unit` and there is one, else in a session of its own.

    The secrets go to the agent's memory and nowhere else.
    """
    folder = _folder(id)
    if unit and _has_manager():
        _start_unit(folder, secrets)
        return {"unit": name_of(id)}
    # -P: what lies in the folder where it starts must not pass for a module.
    argv = [sys.executable, "-P", "-m", "sparkctl", "agent", str(folder.path)]
    LocalTransport(folder.node()).start(argv, log=str(folder.agent_log), env=environ.for_agent(os.environ, secrets))
    return {"unit": ""}


def resume(id: str, attempt: int) -> dict[str, Any]:
    """Make a job that has ended ready to be started with another attempt."""
    _folder(id).go_on(attempt)
    return {}


def list_all() -> dict[str, Any]:
    """Every job of this node, oldest first; a damaged one has an error in place of the rest."""
    on_gpu: tuple[GpuProcess, ...] | None = None
    rows = [_row(folder) for folder in job.folders()]
    for row in rows:
        pids = row.pop("pids", ())
        if pids:
            on_gpu = footprint.gpu_users() if on_gpu is None else on_gpu
            row["memory"] = footprint.held(pids, on_gpu)
    return {"jobs": rows}


def look(id: str, files: Mapping[str, int]) -> dict[str, Any]:
    """The job's state, and of each file in its folder what comes after that many bytes: up to PIECE, in base64.

    The state is looked at first: what was written before the end is never missed.
    """
    folder = _folder(id)
    state = folder.state()
    pieces = {
        name: base64.b64encode(_piece(folder.path / _plain(name), offset)).decode() for name, offset in files.items()
    }
    return {"state": state.model_dump(mode="json"), "supervised": folder.supervised(), "files": pieces}


def stop(id: str, now: bool) -> dict[str, Any]:
    """Ask the job's agent to stop it."""
    _folder(id).ask_to_stop(now=now)
    return {}


def remove(id: str) -> dict[str, Any]:
    """Remove the folder of a job that no agent supervises.

    Raises:
        FailedError: it runs.
    """
    folder = _folder(id)
    if folder.supervised():
        raise FailedError(f"job {id} runs", f"sparkctl stop {id}")
    _disable(id)
    shutil.rmtree(folder.path)
    return {}


def contents(id: str, name: str) -> dict[str, Any]:
    """The files below a folder of the job: their sizes by path; none where it is not there."""
    top = _folder(id).path / _plain(name)
    found = sorted(path for path in top.rglob("*") if path.is_file() and not path.is_symlink()) if top.is_dir() else []
    return {"files": {path.relative_to(top).as_posix(): path.stat().st_size for path in found}}


def board(id: str) -> dict[str, Any]:
    """Have TensorBoard of a job answer on this node's loopback, as long as this process lives."""
    found = _BOARDS.of(_folder(id))
    return {"port": found.port, "path": found.path}


def memory() -> dict[str, Any]:
    """This machine's memory as it is now, or nothing where it cannot be told; and whether it has a GPU: see launch.box."""
    now = this_memory()
    return {"memory": None if now is None else asdict(now), "gpu": this_has_gpu()}


_ORDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "create": create,
    "start": start,
    "resume": resume,
    "list": list_all,
    "look": look,
    "stop": stop,
    "remove": remove,
    "contents": contents,
    "memory": memory,
    "board": board,
}


def obey(order: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one order.

    Raises:
        SparkctlError: it cannot be done.
    """
    return _ORDERS[order](**arguments)


def main() -> None:
    """Answer orders from standard input until it ends."""
    for line in sys.stdin.buffer:
        if line.strip():
            sys.stdout.write(f"{MARK}{json.dumps(_answer(line))}\n")
            sys.stdout.flush()


def _answer(line: bytes) -> dict[str, Any]:
    try:
        order, arguments = json.loads(line)
        return {"done": obey(order, arguments)}
    except SparkctlError as error:
        return {"failed": error.message, "fix": error.fix, "status": error.status}
    except Exception as error:  # noqa: BLE001, RUF100 - whoever asked must learn of it
        return {"failed": f"{type(error).__name__}: {error}", "fix": "", "status": 1}


def _folder(id: str) -> JobFolder:
    path = job.home() / "jobs" / _plain(id)
    if not (path / "spec.json").is_file():
        raise WrongInputError(f"{id}: no such job", "`sparkctl jobs --all` lists them")
    return JobFolder(path)


def _plain(name: str) -> str:
    """A name inside a folder, and not a way out of it."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise WrongInputError(f"{name}: not a name", "")
    return name


def _row(folder: JobFolder) -> dict[str, Any]:
    try:
        spec, state = folder.spec(), folder.state()
    except FailedError as error:
        return {"id": folder.id, "error": error.message}
    return {
        "id": folder.id,
        "folder": str(folder.path),
        "spec": spec.model_dump(mode="json"),
        "state": state.model_dump(mode="json"),
        "last": job.last_metrics(folder),
        "pids": [] if state.ended else _our_ranks(folder, spec, state),
    }


def _our_ranks(folder: JobFolder, spec: JobSpec, state: JobState) -> list[int]:
    """The processes of this node's ranks; the head's state tells of the peer's too."""
    here = spec.ranks_of(folder.node()) if spec.link is not None else spec.ranks
    return [state.rank_pids[rank.rank] for rank in here if rank.rank in state.rank_pids]


def _piece(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(PIECE)
    except FileNotFoundError:
        return b""


# The unit.


def _systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    runtime = f"/run/user/{os.getuid()}"
    given = {} if os.environ.get("XDG_RUNTIME_DIR") or not Path(runtime).is_dir() else {"XDG_RUNTIME_DIR": runtime}
    return subprocess.run(
        ["systemctl", "--user", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SYSTEMCTL_SECONDS,
        check=False,
        env=os.environ | given,
    )


def _has_manager() -> bool:
    """Whether the user has a systemd manager that knows our unit."""
    try:
        return _systemctl("cat", "sparkctl-job@.service").returncode == 0
    except OSError:
        return False


def _start_unit(folder: JobFolder, secrets: Mapping[str, str]) -> None:
    name = name_of(folder.id)
    if secrets:
        os.mkfifo(folder.secrets_pipe, 0o600)
    try:
        _enable(folder.node(), name)
        if secrets:
            _hand_over(folder.secrets_pipe, secrets)
    except BaseException:
        _disable(folder.id)
        raise
    finally:
        folder.secrets_pipe.unlink(missing_ok=True)


def _enable(node: str, name: str) -> None:
    done = _systemctl("enable", "--now", "--quiet", name)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise FailedError(f"{node}: {said[-1] if said else name}", "`sparkctl up` installs the unit anew")


def _hand_over(pipe: Path, secrets: Mapping[str, str]) -> None:
    """Write them to the agent as soon as it reads: what is in a pipe is on no disk."""
    deadline = time.monotonic() + SECRETS_WITHIN
    while True:
        with contextlib.suppress(OSError):  # ENXIO: nobody reads yet
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        if time.monotonic() > deadline:
            raise FailedError("the agent did not take the secrets of the inventory's `env`", "look at its agent.log")
        time.sleep(0.05)
    with os.fdopen(descriptor, "wb") as file:
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            raise FailedError(f"{pipe}: not a pipe", "is somebody else at work in the job's folder?")
        os.set_blocking(descriptor, True)
        file.write(json.dumps(dict(secrets)).encode())


def _disable(id: str) -> None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if Path("~/.config/systemd/user").expanduser().is_dir():
            _systemctl("disable", "--now", "--quiet", name_of(id))
