"""The target's side of a transfer: a folder that is filled beside its place, and takes it when all of it is there and verified.

Sent to the nodes (see cluster.transport.shipped): standard library only, any Python from 3.8. A folder NAME is filled as
.NAME.part, where `.done` notes each chunk that has been written, with its digest: whoever comes after an interruption reads those
again and takes up from there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from cluster.transfer.digests import SHA256, XXH3, new, usable
from cluster.transfer.manifest import Chunk, Manifest

_HEX = {XXH3: 32, SHA256: 64}  # digits
_READ = 4 << 20
_MARGIN = 64 << 20  # bytes of the disk that are left alone
_DONE, _LOCK, _WHAT = ".done", ".lock", ".manifest"


class NoRoomError(OSError):
    """The disk has not enough space."""

    def __init__(self, need: int, free: int) -> None:
        super().__init__(errno.ENOSPC, f"needs {need} bytes, {free} are free")
        self.need, self.free = need, free


class BusyError(OSError):
    """Somebody else fills the folder now."""


class DamagedError(OSError):
    """What arrived is not what was sent."""


class Staging:
    """A folder in the making. Chunks may be written by several threads at once."""

    def __init__(self, final: str, manifest: Manifest) -> None:
        self.final = Path(final)
        self.part = self.final.with_name(f".{self.final.name}.part")
        self.manifest = manifest
        self._files: list[int] = []
        self._noting = threading.Lock()
        self._lock = -1
        self._note = -1

    @property
    def complete(self) -> bool:
        """Whether the folder has been made before."""
        return self.final.is_dir()

    def begin(self) -> None:
        """Make room for all of it.

        Raises:
            NoRoomError: the disk is too full; nothing is left behind that was not there before.
            BusyError: another transfer is at it.
            OSError: the folder cannot be made.
        """
        self.final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_new = not self.part.exists()
        try:
            self.part.mkdir(mode=0o700, exist_ok=True)
            self._take()
            self._begin_anew_if_it_is_another()
            self._refuse_full_disk()
            self._open()
        except BaseException:
            self.close()
            if is_new:
                shutil.rmtree(str(self.part), ignore_errors=True)
            raise

    def missing(self) -> list[Chunk]:
        """What is left to do: the chunks that are not there, or, after a power cut, are noted and not there after all."""
        noted = {number: (kind, digest) for number, kind, digest in self._notes() if kind in usable()}
        buffer = memoryview(bytearray(_READ))
        return [
            chunk
            for chunk in self.manifest.chunks()
            if chunk.number not in noted
            or self._digest(chunk, noted[chunk.number][0], buffer) != noted[chunk.number][1]
        ]

    def write(self, chunk: Chunk, data: memoryview, done: int) -> None:
        """Some bytes of a chunk, from its byte `done` on."""
        descriptor, at = self._files[chunk.file], chunk.at + done
        while data:
            count = os.pwrite(descriptor, data, at)
            data, at = data[count:], at + count

    def note(self, chunk: Chunk, kind: str, digest: bytes) -> None:
        """Remember that a chunk is there, and what it is."""
        with self._noting:
            os.write(self._note, f"{chunk.number} {kind} {digest.hex()}\n".encode())

    def finish(self) -> None:
        """Have everything reach the disk, and the folder take its place.

        Raises:
            DamagedError: a file is not the one that the source says it is; it is forgotten, for another attempt.
            OSError: it cannot be written.
        """
        for number, target in enumerate(self.manifest.files):
            descriptor = self._files[number]
            os.fsync(descriptor)
            if target.sha256 and _sha256(descriptor) != target.sha256:
                self._forget(number)
                raise DamagedError(0, f"{target.path}: its SHA-256 is not what the source says")
            # Cached pages count against the memory that the GPU shares.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        for name in (_DONE, _WHAT, _LOCK):
            (self.part / name).unlink()
        self.part.replace(self.final)
        self.close()
        descriptor = os.open(str(self.final.parent), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let go of it; what has arrived stays, to be taken up later."""
        for descriptor in [*self._files, self._note, self._lock]:
            if descriptor >= 0:
                os.close(descriptor)
        self._files, self._note, self._lock = [], -1, -1

    def _take(self) -> None:
        self._lock = os.open(str(self.part / _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(errno.EBUSY, f"{self.part} is being filled by another transfer") from None

    def _begin_anew_if_it_is_another(self) -> None:
        what, digest = self.part / _WHAT, self.manifest.digest()
        with contextlib.suppress(FileNotFoundError):
            if what.read_text() == digest:
                return
        for path in self.part.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(str(path)) if path.is_dir() else path.unlink()
        what.write_text(digest)

    def _refuse_full_disk(self) -> None:
        here = os.statvfs(str(self.part))
        free = here.f_bavail * here.f_frsize
        there = 0
        for target in self.manifest.files:
            with contextlib.suppress(FileNotFoundError):
                there += (self.part / target.path).stat().st_blocks * 512
        need = self.manifest.size - there + _MARGIN
        if need > free and self.manifest.size > there:
            raise NoRoomError(need, free)

    def _open(self) -> None:
        for target in self.manifest.files:
            path = self.part / target.path
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(str(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._files.append(descriptor)
            if target.size:  # so that a disk which fills up meanwhile is told now and not after an hour
                os.posix_fallocate(descriptor, 0, target.size)
            os.ftruncate(descriptor, target.size)
            os.pwrite(descriptor, target.head, 0)
        self._note = os.open(str(self.part / _DONE), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _digest(self, chunk: Chunk, kind: str, buffer: memoryview) -> str:
        total, done = new(kind), 0
        while done < chunk.size:
            part = buffer[: min(len(buffer), chunk.size - done)]
            count = os.preadv(self._files[chunk.file], [part], chunk.at + done)
            if not count:
                break
            total.update(part[:count])
            done += count
        return total.digest().hex()

    def _notes(self) -> Iterable[tuple[int, str, str]]:
        for line in (self.part / _DONE).read_text().splitlines():
            number, _, rest = line.partition(" ")
            kind, _, digest = rest.partition(" ")
            if number.isdigit() and len(digest) == _HEX.get(kind):  # the last may be half written
                yield int(number), kind, digest

    def _forget(self, file: int) -> None:
        """Take no chunk of a file for granted any more."""
        gone = {chunk.number for chunk in self.manifest.chunks() if chunk.file == file}
        text = "".join(f"{number} {kind} {digest}\n" for number, kind, digest in self._notes() if number not in gone)
        (self.part / _DONE).write_text(text)


def _sha256(descriptor: int) -> str:
    total, offset = hashlib.sha256(), 0
    while True:
        data = os.pread(descriptor, _READ, offset)
        if not data:
            return total.hexdigest()
        total.update(data)
        offset += len(data)
