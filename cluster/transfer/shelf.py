"""The source's side of a transfer: bytes of the files below one folder, for whoever asks over a connection that was proved.

Sent to the nodes (see cluster.transport.shipped): standard library only, any Python from 3.8. On a connection:

    asks      an ASK: bytes of the path, offset, size, the kind of digest (see KINDS); and the path
    answers   a SAID, YES and the size; those bytes; their digest
    or        a SAID, NO and the length of a text; the text, which says why
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path
from typing import BinaryIO

from cluster.stream import exactly
from cluster.transfer.digests import KINDS, new
from cluster.transfer.manifest import CHUNK, plain

ASK = struct.Struct("!IQQB")
SAID = struct.Struct("!BQ")
YES, NO = 0, 1
_READ = 1 << 20
_IDLE_SECONDS = 60.0  # without a question, or without room for an answer


class Shelf:
    """The files below `root`. Links are followed as long as they stay below it; those of a hub's cache to its blobs too."""

    def __init__(self, root: str) -> None:
        self.root = Path(os.path.realpath(root))
        # huggingface_hub: models--OWNER--NAME/snapshots/COMMIT/FILE leads to models--OWNER--NAME/blobs/HASH.
        is_snapshot = self.root.parent.name == "snapshots" and self.root.parent.parent.name.startswith("models--")
        self._bounds = self.root.parent.parent if is_snapshot else self.root
        self._files: dict[str, BinaryIO] = {}
        self._opening = threading.Lock()

    def open(self, path: str) -> BinaryIO:
        """A file, opened once and shared: read it by offset only.

        Raises:
            ValueError: the path leads out of the folder.
            OSError: it cannot be opened.
        """
        with self._opening:
            if path not in self._files:
                real = Path(os.path.realpath(str(self.root / plain(path))))
                if self._bounds not in real.parents:
                    raise ValueError(f"{path[:200]!r} leads out of {self.root}")
                self._files[path] = real.open("rb")
            return self._files[path]

    def read(self, path: str, offset: int, size: int, into: memoryview) -> None:
        """Fill `into` with `size` bytes.

        Raises:
            OSError, ValueError: see `open`; the file ends before.
        """
        descriptor, done = self.open(path).fileno(), 0
        while done < size:
            count = os.preadv(descriptor, [into[done:size]], offset + done)
            if not count:
                raise ValueError(f"{path[:200]!r} ends at byte {offset + done}")
            done += count

    def serve(self, connection: socket.socket) -> None:
        """Answer on a connection until the other side ends it."""
        connection.settimeout(_IDLE_SECONDS)
        buffer = memoryview(bytearray(_READ))
        while True:
            first = connection.recv(1)
            if not first:
                return
            length, offset, size, kind = ASK.unpack(first + exactly(connection, ASK.size - 1))
            if length > 4096 or size > CHUNK or kind >= len(KINDS):
                return
            path = exactly(connection, length).decode(errors="replace")
            try:
                file = self.open(path)
                if os.fstat(file.fileno()).st_size < offset + size:
                    raise ValueError(f"{path!r} is shorter than it was")  # noqa: TRY301 - told like the others
            except (OSError, ValueError) as error:
                said = str(getattr(error, "strerror", None) or error).encode()[:1000]
                connection.sendall(SAID.pack(NO, len(said)) + said)
                continue
            connection.sendall(SAID.pack(YES, size))
            _send(connection, file, offset, size)
            connection.sendall(_digest(KINDS[kind], file.fileno(), offset, size, buffer))

    def close(self) -> None:
        """Let go of all files."""
        with self._opening:
            for file in self._files.values():
                file.close()
            self._files.clear()


def _send(connection: socket.socket, file: BinaryIO, offset: int, size: int) -> None:
    if connection.sendfile(file, offset, size) != size:
        raise ConnectionAbortedError(0, "the file has become shorter")


def _digest(kind: str, descriptor: int, offset: int, size: int, buffer: memoryview) -> bytes:
    """Of the bytes that were just sent, which are in the page cache still; and out of it again, for memory is the GPU's too."""
    total, done = new(kind), 0
    while done < size:
        count = os.preadv(descriptor, [buffer[: min(len(buffer), size - done)]], offset + done)
        if not count:
            break
        total.update(buffer[:count])
        done += count
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
    return total.digest()
