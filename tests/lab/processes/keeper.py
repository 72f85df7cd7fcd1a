"""PID 1 of a lab's process namespace: when it ends, for whatever reason, the kernel kills every process of the lab.

    keeper OWNER_PIDFD WORKDIR CGROUP...

Says ``ready`` on stdout, then waits for a line (or the end) of stdin, or for the death of the process behind OWNER_PIDFD: a
pidfd, because a parent-death signal fires when the *thread* that started us ends. Then kills what is left, and removes the
folder and the control groups. Inherits the open lock of the folder, which tells others that the lab lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from pathlib import Path

LOCK = "lock"


def main() -> None:
    owner, workdir, cgroups = int(sys.argv[1]), Path(sys.argv[2]), [Path(group) for group in sys.argv[3:]]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans come to PID 1: let the kernel reap them
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("ready", flush=True)
    waiting = select.poll()
    waiting.register(owner, select.POLLIN)
    waiting.register(sys.stdin, select.POLLIN)
    try:
        waiting.poll()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # everything in this namespace but us
        remove(workdir, cgroups)


def lock(workdir: Path) -> int:
    """A file descriptor that holds the lock of a new lab's folder; whoever inherits it holds it too."""
    unseen = workdir / f"{LOCK}.new"
    held = os.open(unseen, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    unseen.rename(workdir / LOCK)  # nobody ever sees it unlocked
    return held


def locked(workdir: Path) -> bool:
    """Whether a lab's keeper holds its folder: false for what a killed lab left behind."""
    try:
        held = os.open(workdir / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return workdir.exists() and time.time() - workdir.stat().st_mtime < 10  # just being made, or just gone
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(held)
    return False


def remove(workdir: Path, cgroups: list[Path]) -> None:
    """Remove a dead lab's control groups and its folder."""
    import shutil  # here: it would double the time that a lab takes to start

    for group in cgroups:
        remove_cgroup(group)
    shutil.rmtree(workdir, ignore_errors=True)


def remove_cgroup(group: Path, patience: float = 5.0) -> None:
    """Remove a control group and those within; its killed processes may need a moment to go."""
    end = time.monotonic() + patience
    for folder, _, _ in os.walk(group, topdown=False):
        while True:
            try:
                os.rmdir(folder)  # noqa: PTH106 - pathlib has rmdir too, but os.walk gives str
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() > end:
                    return
                time.sleep(0.01)
            else:
                break
