"""What a node's own Python does for us: write, read and start, with everything that names a file or a secret on standard input.

Sent to the node: see cluster.transport.shipped. Its input is an order, one line of JSON, and data; its output an answer, which is a
record separator and one line of JSON, and data. What a login shell prints before that does no harm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

MARK = "\x1e"


def put(path: str, mode: int, size: int) -> dict[str, Any]:
    """Write beside, fsync, rename: on any failure the old file stands and nothing lies beside it."""
    final = Path(path)
    beside = final.with_name(f".{final.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces(sys.stdin.buffer, size):
                file.write(piece)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(final)
    except BaseException:
        beside.unlink()
        raise
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return {}


def get(path: str, offset: int, length: int) -> dict[str, Any]:
    """Announce the size of what follows: what the file holds now, from `offset` on, `length` bytes at most."""
    with Path(path).open("rb") as file:
        left = file.seek(0, os.SEEK_END) - offset
        size = max(0, min(left, length))
        answer({"size": size, "left": left})
        file.seek(offset)
        for piece in pieces(file, size):
            sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()
    raise SystemExit


def pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes of a file, a piece at a time."""
    while size:
        piece = file.read(min(size, 1 << 20))
        if not piece:
            raise EOFError("it ended too early")
        yield piece
        size -= len(piece)


def start(argv: list[str], log: str, env: dict[str, str] | None) -> dict[str, Any]:
    """Start it in a session of its own, which neither the connection nor sshd takes down with it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=env,
        cwd="/",
        start_new_session=True,
    )
    return {"pid": process.pid}


def home() -> dict[str, Any]:
    """The user's home folder and sparkctl's."""
    user = Path.home()
    return {
        "user": str(user),
        "sparkctl": str(user / Path(os.environ.get("SPARKCTL_HOME") or ".sparkctl").expanduser()),
    }


def answer(content: dict[str, Any]) -> None:
    """Print it on a line of its own."""
    sys.stdout.buffer.write((MARK + json.dumps(content) + "\n").encode())
    sys.stdout.buffer.flush()


def main() -> None:
    """Run one errand and answer, if only with what went wrong."""
    what, arguments = json.loads(sys.stdin.buffer.readline())
    errands: dict[str, Callable[..., dict[str, Any]]] = {"put": put, "get": get, "start": start, "home": home}
    try:
        answer(errands[what](**arguments))
    except (OSError, ValueError, EOFError) as error:  # ValueError: a null byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        answer({"error": reason, "about": str(getattr(error, "filename", None) or "")})
