"""What memory the ranks of a job hold on this node now: their own and their children's, and what they have on the GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cluster.readings.box import GpuProcess, gpu_processes

_MIB = 1 << 20
_ASK = ("nvidia-smi", "--query-compute-apps=pid,used_memory,process_name", "--format=csv,noheader")
_WITHIN = 4.0  # seconds: nvidia-smi on a wedged driver never returns


def held(pids: Iterable[int], on_gpu: Iterable[GpuProcess]) -> int:
    """Bytes that these processes and all below them hold: resident, and on the GPU, whose memory no process shows as resident.

    A process that is gone holds nothing.
    """
    family = {one for pid in pids for one in _family(pid)}
    page = os.sysconf("SC_PAGE_SIZE")
    there = sum(_resident(pid) * page for pid in family)
    return there + int(sum((one.memory or 0.0) * _MIB for one in on_gpu if one.pid in family))


def gpu_users() -> tuple[GpuProcess, ...]:
    """The processes on this node's GPU, as nvidia-smi tells; none where it does not."""
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        done = subprocess.run(
            _ASK, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_WITHIN, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return gpu_processes(done.stdout) if done.returncode == 0 else ()


def _family(pid: int) -> set[int]:
    found, left = set[int](), [pid]
    while left:
        one = left.pop()
        if one in found:
            continue
        found.add(one)
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                left += map(int, children.read_text(encoding="ascii").split())
            except OSError:  # the thread has ended
                continue
    return found


def _resident(pid: int) -> int:
    """Pages, without those of files that others share (proc_pid_statm(5))."""
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return 0
    return resident - shared
