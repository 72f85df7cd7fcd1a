"""Our own code as the nodes get it: the three packages, the recipes and constraints.txt, in a folder named by their content."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

_PACKAGES = ("sparkctl", "cluster", "launch")
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Code:
    """Files by their path in the folder, with their bytes."""

    files: tuple[tuple[str, bytes], ...]

    @cached_property
    def hash(self) -> str:
        """Of paths and contents: 16 hexadecimal digits of SHA-256."""
        total = hashlib.sha256()
        for path, content in self.files:
            total.update(f"{path}\0{len(content)}\0".encode() + content)
        return total.hexdigest()[:16]

    @cached_property
    def archive(self) -> bytes:
        """A compressed tar archive, the same for the same files."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as tar:
            for path, content in self.files:
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return packed.getvalue()


@cache
def own(root: Path = _ROOT) -> Code:
    """The code that runs now, from a checkout, an installed package, or a folder that was shipped; read once."""
    return Code(tuple(sorted(_files(root))))


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    for package in _PACKAGES:
        yield from _below(root, root / package)
    # A wheel carries these in the package, a checkout and a shipped folder beside it.
    data = root / "sparkctl" / "_data"
    beside = data if data.is_dir() else root
    yield "constraints.txt", (beside / "constraints.txt").read_bytes()
    yield from _below(beside, beside / "recipes")


def _below(root: Path, folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(root).as_posix(), path.read_bytes()
