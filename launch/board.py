"""TensorBoard of a fine-tune on its head, for as long as somebody looks: on loopback, below a path that proves the job's key.

It is a process of its own. It ends when its standard input does: when whoever has started it goes, however that comes about.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import selectors
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from cluster.errors import FailedError
from launch.job import JobFolder

# Seconds. TensorBoard starts in one.
_UP_WITHIN = 45.0
_LOOPBACK = "127.0.0.1"


def path_of(key: str) -> str:
    """The path that TensorBoard answers below; nobody guesses it. Pure."""
    return "/" + hmac.digest(key.encode(), b"sparkctl tensorboard", hashlib.sha256).hex()[:32]


@dataclass(frozen=True)
class Board:
    """One that runs."""

    process: subprocess.Popen[bytes]
    port: int
    path: str


class Boards:
    """Those that this process has started: of each job at most one."""

    def __init__(self) -> None:
        self._known: dict[str, Board] = {}
        self._turn = threading.Lock()

    def of(self, folder: JobFolder) -> Board:
        """The job's, started if it does not run.

        Raises:
            FailedError: it does not start.
        """
        with self._turn:
            known = self._known.get(folder.id)
            if known is None or known.process.poll() is not None:
                known = self._known[folder.id] = _start(folder)
            return known


def _start(folder: JobFolder) -> Board:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "sparkctl", "board", str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C is for whoever looks
    )
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        told = process.stdout.readline() if selector.select(_UP_WITHIN) else b""
    if not told.strip().isdigit():
        process.kill()
        process.wait()
        raise FailedError(
            f"{folder.node()}: TensorBoard does not start",
            f"{sys.executable} -m tensorboard.main --logdir {folder.tensorboard}",
        )
    return Board(process, int(told), path_of(folder.key()))


def serve(folder: JobFolder) -> None:
    """Be the process: tell the port, and serve until standard input ends."""
    from tensorboard import program

    logging.disable(logging.WARNING)
    board = program.TensorBoard()
    # Its faster reader of event files (load_fast) listens on a port of its own that asks for nothing.
    board.configure(
        [
            "tensorboard",
            *("--logdir", str(folder.tensorboard), "--host", _LOOPBACK, "--port", "0"),
            *("--load_fast", "false", "--reload_interval", "2"),
        ],
        path_prefix=path_of(folder.key()),  # not among the words that `ps` would look for
    )
    url = urlsplit(board.launch())
    sys.stdout.write(f"{url.port}\n")
    sys.stdout.flush()
    while os.read(0, 4096):
        time.sleep(0.1)
    os._exit(0)
