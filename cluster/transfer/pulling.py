"""Chunks into a staging folder: over several connections at once, from a folder of this machine, or however else they are had.

Sent to the nodes (see cluster.transport.shipped): standard library only, any Python from 3.8.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from cluster.stream import exactly, reason
from cluster.transfer.digests import KINDS, SHA256, new
from cluster.transfer.manifest import Chunk
from cluster.transfer.shelf import ASK, SAID, YES, Shelf
from cluster.transfer.staging import Staging

_BUFFER = 2 << 20
_AHEAD = 2  # questions under way on a connection, so that the source never waits for one
_ATTEMPTS = 3  # for a chunk that arrives damaged, and for a connection that is lost
_STALL_SECONDS = 20.0
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)  # no other way would help


class SourceError(OSError):
    """The source will not, or cannot, give a chunk: asking again would not help."""


Take = Callable[[bool], "Chunk | None"]


class Way(Protocol):
    """A way to have chunks; it may be used by one thread at a time."""

    def fetch(self, take: Take, staging: Staging, arrived: Callable[[Chunk, int], None]) -> None:
        """Write chunks until there are no more, and note them.

        Args:
            take: the next chunk; None: there is none now. With True it waits for those that others may give back, and None is
                the end.
            arrived: told of each part of a chunk as it is written (bytes), less than 0 what is taken back, and with 0 that it is
                whole and noted.

        Raises:
            SourceError: see there.
            OSError: this way is lost, or the disk is full.
        """
        ...


class Connection:
    """Chunks over a connection to a Shelf that serves."""

    def __init__(self, open_: Callable[[], socket.socket], digest: str = SHA256) -> None:
        """`digest`: of the kinds that both sides can compute."""
        self._open, self._digest = open_, digest

    def fetch(self, take: Take, staging: Staging, arrived: Callable[[Chunk, int], None]) -> None:
        """See Way.fetch."""
        buffer = memoryview(bytearray(_BUFFER))
        with self._open() as connection:
            connection.settimeout(_STALL_SECONDS)
            asked: deque[Chunk] = deque()
            while True:
                while len(asked) < _AHEAD:
                    chunk = take(not asked)
                    if chunk is None:
                        break
                    asked.append(chunk)
                    path = chunk.source.encode()
                    connection.sendall(ASK.pack(len(path), chunk.offset, chunk.size, KINDS.index(self._digest)) + path)
                if not asked:
                    return
                self._take(connection, asked.popleft(), staging, buffer, arrived)

    def _take(
        self,
        connection: socket.socket,
        chunk: Chunk,
        staging: Staging,
        buffer: memoryview,
        arrived: Callable[[Chunk, int], None],
    ) -> None:
        said, size = SAID.unpack(exactly(connection, SAID.size))
        if said != YES:
            raise SourceError(0, exactly(connection, min(size, 1000)).decode(errors="replace"))
        if size != chunk.size:
            raise SourceError(0, "the source answers something else than it was asked")
        total, done = new(self._digest), 0
        while done < size:
            part = buffer[: min(len(buffer), size - done)]
            got = connection.recv_into(part, len(part), socket.MSG_WAITALL)
            if not got:
                raise ConnectionResetError(0, "the other side has hung up")
            part = part[:got]
            staging.write(chunk, part, done)
            total.update(part)
            done += got
            arrived(chunk, got)
        if total.digest() != exactly(connection, total.digest_size):
            raise ConnectionError(0, f"{chunk.source}: arrived damaged")
        staging.note(chunk, self._digest, total.digest())
        arrived(chunk, 0)


class Here:
    """Chunks from a folder of this machine."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def fetch(self, take: Take, staging: Staging, arrived: Callable[[Chunk, int], None]) -> None:
        """See Way.fetch."""
        buffer = memoryview(bytearray(_BUFFER))
        while True:
            chunk = take(True)
            if chunk is None:
                return
            total = new(SHA256)
            for done in range(0, chunk.size, _BUFFER):
                part = buffer[: min(_BUFFER, chunk.size - done)]
                try:
                    self._shelf.read(chunk.source, chunk.offset + done, len(part), part)
                except (OSError, ValueError) as error:
                    raise SourceError(0, str(getattr(error, "strerror", None) or error)) from None
                staging.write(chunk, part, done)
                total.update(part)
                arrived(chunk, len(part))
            staging.note(chunk, SHA256, total.digest())
            arrived(chunk, 0)


class Pull:
    """A transfer under way: the ways share out what is missing; a way that is lost leaves its part to the others."""

    def __init__(self, staging: Staging) -> None:
        self.total = staging.manifest.moved
        self.done = 0
        self.error: OSError | None = None
        self.running = True
        self._staging = staging
        self._waiting: deque[Chunk] = deque()
        self._left: dict[int, Chunk] = {}
        self._partly: dict[int, int] = {}  # bytes of chunks that are not whole yet
        self._changed = threading.Condition()
        self._alive = 0  # ways that are followed still
        self._closed = False

    def run(self, ways: Sequence[Way]) -> None:
        """Fetch what is missing of a folder that was begun, and have it take its place; `error` says why not."""
        try:
            missing = self._staging.missing()
            self._waiting, self._left = deque(missing), {chunk.number: chunk for chunk in missing}
            self.done = self.total - sum(chunk.size for chunk in missing)
            self._alive = len(ways)
            threads = [threading.Thread(target=self._go, args=(way,), daemon=True) for way in ways]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if self.error is None and self._left:
                self.error = OSError(0, "the connections were lost")
            if not self._left:
                self.error = None
                self._staging.finish()
        except OSError as error:
            self.error = error
        finally:
            self._staging.close()
            self.running = False

    def _go(self, way: Way) -> None:
        try:
            self._follow(way)
        finally:
            with self._changed:
                self._alive -= 1
                self._changed.notify_all()

    def _follow(self, way: Way) -> None:
        for attempt in range(_ATTEMPTS):
            taken: set[int] = set()
            try:
                way.fetch(partial(self._take, taken), self._staging, self._arrived)
            except OSError as error:
                is_final = isinstance(error, SourceError) or error.errno in _OF_THE_DISK
                self._give_back(taken)
                if is_final or not taken or attempt == _ATTEMPTS - 1:  # nothing taken: it never came about
                    self._fail(error, is_final)
                    return
            else:
                return

    def _fail(self, error: OSError, is_final: bool) -> None:
        with self._changed:
            if self.error is None or is_final:
                self.error = error
            self._closed = self._closed or is_final
            self._changed.notify_all()

    def _take(self, taken: set[int], wait: bool) -> Chunk | None:
        with self._changed:
            while wait and not self._waiting and self._left and not self._closed and self._alive > 1:
                self._changed.wait(1.0)
            if self._closed or not self._waiting:
                return None
            chunk = self._waiting.popleft()
            taken.add(chunk.number)
            return chunk

    def _give_back(self, taken: set[int]) -> None:
        with self._changed:
            for number in sorted(taken, reverse=True):
                if number in self._left:
                    self.done -= self._partly.pop(number, 0)
                    self._waiting.appendleft(self._left[number])
            self._changed.notify_all()

    def _arrived(self, chunk: Chunk, size: int) -> None:
        with self._changed:
            if size == 0:
                self._partly.pop(chunk.number, None)
                self._left.pop(chunk.number, None)
                if not self._left:
                    self._changed.notify_all()
            else:
                self.done += size
                self._partly[chunk.number] = self._partly.get(chunk.number, 0) + size


def why(error: OSError) -> str:
    """What went wrong, in words."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else reason(error)
