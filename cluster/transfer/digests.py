"""Digests that tell whether a chunk has arrived as it was sent: XXH3 where xxhash can be imported, else SHA-256.

Sent to the nodes (see cluster.transport.shipped): standard library only, any Python from 3.8; xxhash is in the environment that
`up` makes, and a node's own Python, which may lack it, gets by without. Neither digest is asked to hold against forgery: who
sends has proved to know the job's token, and what a source vouches for is a file's SHA-256 (see Target.sha256).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

XXH3, SHA256 = "xxh3", "sha256"
# Best first; on the wire a digest is its place in here. On one core here XXH3 takes 30 GB/s, SHA-256 1.4 by the processor's own
# instructions (which a GB10 has too), BLAKE2b 0.5.
KINDS = (XXH3, SHA256)


class Digest(Protocol):
    """As hashlib's and xxhash's are."""

    @property
    def digest_size(self) -> int:
        """Bytes."""
        ...

    def update(self, data: memoryview) -> None:
        """Take in more."""
        ...

    def digest(self) -> bytes:
        """Of everything so far."""
        ...


def usable() -> tuple[str, ...]:
    """What can be computed here, best first."""
    try:
        import xxhash  # noqa: F401
    except ImportError:
        return (SHA256,)
    return KINDS


def common(theirs: Sequence[str]) -> str:
    """The best that both sides can compute."""
    return next(kind for kind in usable() if kind in theirs or kind == SHA256)


def new(kind: str) -> Digest:
    """An empty digest of a usable kind."""
    if kind == XXH3:
        import xxhash

        return xxhash.xxh3_128()
    return hashlib.sha256()
