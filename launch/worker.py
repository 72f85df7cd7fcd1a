"""A rank: reads the job's spec, joins its group, and trains or answers.

Started by the agent, or by torchrun with the same environment variables:

    torchrun --nproc-per-node 2 -m sparkctl worker JOB_FOLDER
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import FailedError, PassingError, SparkctlError
from launch.agent import report
from launch.agent.report import FailureKind, Report, Reporter
from launch.job import JobFolder, JobSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def main(folder: str) -> int:
    """Run this rank to its end; returns its exit status."""
    reporter = Reporter()
    _die_with_parent()
    os.umask(0o077)
    _quieten()
    try:
        return _run(JobFolder(Path(folder)), reporter)
    except SparkctlError as error:
        print(f"error: {error.message}\n{error.fix}", file=sys.stderr)  # noqa: T201 - the rank's log
        reporter.tell(Report("failed", kind=_told(error), message=error.message, fix=error.fix))
        return error.status
    except Exception as error:
        traceback.print_exc()
        reporter.tell(Report("failed", kind=_kind(error), message=_first_line(error), fix=_FIXES.get(_kind(error), "")))
        return 1


def _run(folder: JobFolder, reporter: Reporter) -> int:
    spec = folder.spec()
    place, _ = _place(spec)
    if spec.recipe["kind"] == "command":
        from launch import program

        return program.run(folder, spec, place, reporter)
    reporter.tell(Report("loading"))
    work = _work(spec)
    import torch

    if spec.embedded and spec.world_size > 1:
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    from launch import group

    rank, world = _place(spec)
    if world > 1:
        group.join(spec, rank, world, device)
    _cap_memory(spec.ranks[rank].memory, device)
    print(f"node {spec.ranks[rank].node} holds {spec.cut(rank)} on {device}", flush=True)  # noqa: T201 - the rank's log
    torch.manual_seed(int(spec.recipe.get("seed") or 0))
    report.listens(reporter)
    work(folder, spec, rank, device, reporter)
    group.leave()
    return 0


def _work(spec: JobSpec) -> Callable[[JobFolder, JobSpec, int, torch.device, Reporter], None]:
    """What a rank does for a job of this kind.

    Its imports make hundreds of thousands of objects that stay for good: to look for garbage among them costs a second now, and
    more in every later round.
    """
    gc.disable()
    run: Callable[[JobFolder, JobSpec, int, torch.device, Reporter], None]
    if spec.recipe["kind"] == "finetune":
        from launch.finetune.loop import run
    elif spec.requests:
        from launch.inference.batch import run
    else:
        from launch.inference.serve import run
    gc.freeze()
    gc.enable()
    return run


def _place(spec: JobSpec) -> tuple[int, int]:
    """This rank and the size of its world, as the environment says."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != spec.world_size:
        raise FailedError(
            f"rank {rank}: started in a world of {world}, but the job has {spec.world_size} ranks",
            "start as many ranks as the plan has",
        )
    return rank, world


def _cap_memory(most: int, device: torch.device) -> None:
    """Keep a GPU's allocations under the plan's: no cgroup counts them, and on one memory for all they would freeze the box."""
    import torch

    if most and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)


def _die_with_parent() -> None:
    """Ask the kernel to end this rank when its agent dies, however that happens; had it died before, the first report tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _quieten() -> None:
    """Keep out of the log what its reader can do nothing about: deprecations between libraries, kernels for 4 bits on a CPU."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


_FIXES = {
    "memory": "`sparkctl plan` shows what takes the room: a shorter sequence_len or a smaller micro_batch_size takes less"
}


def _told(error: SparkctlError) -> FailureKind:
    """The same of one that says for itself what is wrong."""
    if isinstance(error, PassingError):
        return "peer" if error.echo else "crash"
    return "input" if error.status == 2 else "told"


def _kind(error: Exception) -> FailureKind:
    """What sort of failure it is: whether it is worth another try."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "memory"
    return "peer" if _is_echo(error) else "crash"


def _is_echo(error: Exception) -> bool:
    """Whether the failure is only that another rank went away."""
    import torch.distributed as dist

    text = str(error)
    return isinstance(error, dist.DistError) or "gloo/transport" in text or "Connection closed by peer" in text


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
