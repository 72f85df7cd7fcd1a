"""What lies in a folder on a node: its files, config.json, and the headers of its safetensors. No tensor data is read.

Sent to the nodes (see cluster.transport.shipped): standard library only, any Python from 3.8. `main` answers one order, one line of
JSON on standard input, which names paths: for each what lies there, or null.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

MARK = "\x1e"
INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
ADAPTER = "adapter_model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes: the safetensors reference reader's
_PIECE, _PIECES = 16 << 10, 16  # bytes and number of the samples
_TEXT_LIMIT = 16 << 20


class File(NamedTuple):
    """A file's size in bytes, when it was last changed, in ns, and a digest of samples of it (of all of it, where it is small)."""

    size: int
    changed: int
    sample: str = ""


@dataclass(frozen=True)
class Contents:
    """What `look` saw of a folder (or of a file, which is then called "."): see there."""

    path: str
    files: dict[str, File]
    config: str | None = None
    headers: dict[str, bytes] = field(default_factory=dict)
    broken: str = ""

    @classmethod
    def of(cls, told: dict[str, Any]) -> Contents:
        """From what `look` tells.

        Raises:
            LookupError, TypeError, ValueError: it makes no sense.
        """
        return cls(
            str(told["path"]),
            {
                str(name): File(int(size), int(changed), str(sample))
                for name, (size, changed, sample) in told["files"].items()
            },
            None if told["config"] is None else str(told["config"]),
            {str(name): zlib.decompress(base64.b64decode(packed)) for name, packed in told["headers"].items()},
            str(told["broken"]),
        )

    @property
    def is_file(self) -> bool:
        """Whether it is one file and no folder."""
        return "." in self.files


def look(path: str) -> dict[str, Any] | None:
    """What lies at a path; None: nothing that could be read.

    `path` is where that is, absolute. Of a folder: `files`, for each what File says; `config` as
    text; `headers` of the safetensors that count, by file, deflated; `broken`, what is wrong with them. Of a file: `files` with the
    one name ".".
    """
    try:
        place = Path(os.path.abspath(str(Path(path).expanduser())))  # noqa: PTH100 - a link stays what it is called
        if place.is_file():
            seen = place.stat()
            files = {".": [seen.st_size, seen.st_mtime_ns, _sample(place, seen.st_size)]}
            return {"path": str(place), "files": files, "headers": {}, "config": None, "broken": ""}
        found = {entry.name: entry.stat() for entry in os.scandir(str(place)) if entry.is_file()}
    except (OSError, ValueError, RuntimeError):  # a null byte; nobody's home
        return None
    told: dict[str, Any] = {
        "path": str(place),
        "files": {
            name: [seen.st_size, seen.st_mtime_ns, _sample(place / name, seen.st_size)]
            for name, seen in sorted(found.items())
        },
        "config": _text(place / CONFIG) if CONFIG in found else None,
        "headers": {},
        "broken": "",
    }
    try:
        for name in shards_of(found, _text(place / INDEX), str(place)):
            told["headers"][name] = base64.b64encode(zlib.compress(_header(place / name), 1)).decode()
    except (OSError, ValueError) as error:
        told["broken"] = str(error)
    return told


def shards_of(names: Container[str], index: str | None, where: str) -> list[str]:
    """The safetensors that make up a model, or an adapter, of a folder with these names.

    Raises:
        ValueError: the index is none, or names something that is not there.
    """
    if INDEX not in names:
        return [name for name in (SINGLE, ADAPTER) if name in names][:1]
    try:
        shards = sorted(set(json.loads(index or "")["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{where}/{INDEX}: is no safetensors index") from None
    for name in shards:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{where}/{INDEX}: names {name!r}, which is no plain file name")
        if name not in names:
            raise ValueError(f"{where}/{INDEX}: names {name}, which is not there")
    return shards


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
            raise ValueError(f"{path}: is no safetensors file, or cut short ({size} bytes)")
        return file.read(length)


def _sample(path: Path, size: int) -> str:
    """Two files of one shape, a model before and after it was tuned say, differ all over: a few looks tell them apart."""
    total = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            for offset in range(0, size, max(_PIECE, size // _PIECES)):
                total.update(os.pread(file.fileno(), _PIECE, offset))
            total.update(os.pread(file.fileno(), _PIECE, max(0, size - _PIECE)))
    except OSError:  # whoever reads it is told
        return ""
    return total.hexdigest()


def _text(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(_TEXT_LIMIT).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def main() -> None:
    """Answer one order."""
    paths = json.loads(sys.stdin.buffer.readline())
    print(MARK + json.dumps([look(path) for path in paths]), flush=True)  # noqa: T201 - the answer
