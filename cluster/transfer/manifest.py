"""What is to lie in a folder when a transfer is done: its files, and for each of their bytes where it comes from. Pure.

Sent to the nodes (see cluster.transport.shipped): standard library only, any Python from 3.8.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

CHUNK = 16 << 20  # bytes that are asked for, verified and noted as one
_MOST_PATH = 4096


class UnsafePathError(ValueError):
    """A path that could lead out of its folder."""


@dataclass(frozen=True)
class Piece:
    """`size` bytes of the target from byte `at` on: those of the file `source` from byte `offset` on."""

    at: int
    source: str
    offset: int
    size: int


@dataclass(frozen=True)
class Target:
    """A file to be made: `head` as it is, then pieces of the source's files. `sha256` of all of it, where that is known."""

    path: str
    size: int
    head: bytes
    pieces: tuple[Piece, ...]
    sha256: str = ""


@dataclass(frozen=True)
class Chunk:
    """A part of a piece, at most CHUNK bytes; `file` is the number of its target."""

    number: int
    file: int
    at: int
    source: str
    offset: int
    size: int


@dataclass(frozen=True)
class Manifest:
    """All files of a folder."""

    files: tuple[Target, ...]

    @property
    def size(self) -> int:
        """Bytes of all the files."""
        return sum(target.size for target in self.files)

    @property
    def moved(self) -> int:
        """Bytes that come from the source."""
        return sum(piece.size for target in self.files for piece in target.pieces)

    def chunks(self) -> Iterator[Chunk]:
        """Everything that comes from the source, in the same order and with the same numbers each time."""
        number = 0
        for file, target in enumerate(self.files):
            for piece in target.pieces:
                for done in range(0, piece.size, CHUNK):
                    size = min(CHUNK, piece.size - done)
                    yield Chunk(number, file, piece.at + done, piece.source, piece.offset + done, size)
                    number += 1

    def check(self) -> None:
        """Make sure that every path is plain and every byte of each file is given once.

        Raises:
            UnsafePathError: a path is absolute, or has `..` in it.
            ValueError: pieces overlap, leave a hole, or end beyond the file.
        """
        for target in self.files:
            plain(target.path)
            end = len(target.head)
            for piece in target.pieces:
                plain(piece.source)
                if piece.at != end or piece.size <= 0 or piece.offset < 0:
                    raise ValueError(f"{target.path}: its pieces do not join")
                end += piece.size
            if end != target.size:
                raise ValueError(f"{target.path}: its pieces do not make {target.size} bytes")

    def digest(self) -> str:
        """What tells this manifest from any other: 32 hexadecimal digits."""
        return hashlib.blake2b(json.dumps(self.to_json()).encode(), digest_size=16).hexdigest()

    def to_json(self) -> list[Any]:
        """As lists, short enough for forty thousand tensors."""
        return [
            [
                target.path,
                target.size,
                base64.b64encode(target.head).decode(),
                [[piece.at, piece.source, piece.offset, piece.size] for piece in target.pieces],
                target.sha256,
            ]
            for target in self.files
        ]

    @classmethod
    def from_json(cls, given: list[Any]) -> Manifest:
        """What `to_json` made; checked.

        Raises:
            ValueError: it is none (or UnsafePathError, which is one).
        """
        made = cls(
            tuple(
                Target(path, size, base64.b64decode(head), tuple(Piece(*piece) for piece in pieces), sha256)
                for path, size, head, pieces, sha256 in given
            )
        )
        made.check()
        return made


def plain(path: str) -> str:
    """The path itself, if it is relative and stays below where it starts.

    Raises:
        UnsafePathError: it is not.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path or len(path) > _MOST_PATH:
        raise UnsafePathError(f"{path[:200]!r} is no path below a folder")
    return path


def whole(path: str, size: int, *, at: str = "", sha256: str = "") -> Target:
    """A file as it is at the source, under the name `at` (else its own)."""
    pieces = (Piece(0, path, 0, size),) if size else ()
    return Target(at or path, size, b"", pieces, sha256)
