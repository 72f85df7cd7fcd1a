"""Starting a child in another process namespace.

``nsenter --pid`` and ``unshare --pid`` would do, but they stay between us and the program. nsenter even stops for good when
the program is stopped once, as systemd does to every process before it reboots: then nobody reaps the program, and its
namespace never ends.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CLONE_NEWPID = 0x20000000


def popen_in(pid: int | None, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """subprocess.Popen, with the child in the process namespace of ``pid`` (None: as PID 1 of a new one).

    The child is ours to signal and to wait for. Raises OSError when there is no such process.
    """
    with ThreadPoolExecutor(
        1
    ) as thread:  # a namespace is chosen for the children of one thread, and this one ends here
        return thread.submit(_start, pid, argv, options).result()


def _start(pid: int | None, argv: Sequence[str], options: dict[str, Any]) -> subprocess.Popen[Any]:
    libc = ctypes.CDLL(None, use_errno=True)
    if pid is None:
        failed = libc.unshare(CLONE_NEWPID)
    else:
        namespace = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY)
        failed = libc.setns(namespace, CLONE_NEWPID)
        os.close(namespace)
    if failed:
        raise OSError(ctypes.get_errno(), f"no process namespace for {argv[0]}")
    return subprocess.Popen(argv, **options)
