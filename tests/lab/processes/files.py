"""Two small acts on file descriptors."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path


def write_in_place(path: Path, data: bytes) -> None:
    """Replace a file's content, never empty in between, and keep the inode: whoever has it mounted or mapped holds on to it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(file, data)
    os.ftruncate(file, len(data))
    os.close(file)


def drain(netlink: socket.socket) -> None:
    """Forget the events that wait in a non-blocking netlink socket: whoever calls looks at everything anyway."""
    while True:
        try:
            netlink.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # some were lost: as good as read
                raise
