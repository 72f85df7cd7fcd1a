"""A checkpoint's tensors by name, read eagerly: straight to their place, with no mapping and nothing left in the page cache.

On a Spark the page cache and the GPU share one memory, so a mapped file would count twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.errors import WrongInputError
from launch import tensors

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What is read at once where it cannot go straight to its place (another type, another device, another stride).
BUFFER = 4 << 20


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `size` bytes at `offset` of `path`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    size: int


class Checkpoint:
    """The safetensors of one folder. Nothing but headers is read until a tensor is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            WrongInputError: a file that the index names is not there, is cut short or damaged; or there are none.
        """
        self.folder = folder
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        tensors.of_folder(folder)  # says what is wrong, in words
        self.entries: Mapping[str, Entry] = {entry.name: entry for path in _files(folder) for entry in _entries(path)}

    @classmethod
    def of_file(cls, path: Path) -> Checkpoint:
        """Of a single safetensors file.

        Raises:
            WrongInputError: it is not there, cut short or damaged.
        """
        made = cls.__new__(cls)
        made.folder, made.bytes_read, made._files = path.parent, 0, {}
        try:
            tensors.of_file(path)
        except OSError as error:
            raise WrongInputError(f"{path}: cannot be read ({error.strerror})", "check the folder") from None
        made.entries = {entry.name: entry for entry in _entries(path)}
        return made

    def read(self, entry: Entry, out: torch.Tensor) -> None:
        """Fill `out` with the tensor of `entry`: of its shape; type, device and strides are those of `out`."""
        assert tuple(out.shape) == entry.shape, (entry.name, tuple(out.shape), entry.shape)
        plain = out.dtype == entry.dtype and out.device.type == "cpu" and out.is_contiguous()
        if not plain:
            self._convert(entry, out)
        elif entry.size:
            self._pread(entry, 0, out.view(-1).view(torch.uint8))
        self._forget(entry)

    def load(self, entry: Entry, dtype: torch.dtype | None = None, device: torch.device | None = None) -> torch.Tensor:
        """The tensor of `entry`, new."""
        out = torch.empty(entry.shape, dtype=dtype or entry.dtype, device=device)
        self.read(entry, out)
        return out

    def close(self) -> None:
        """Close its files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _convert(self, entry: Entry, out: torch.Tensor) -> None:
        """Read in pieces of whole rows, at most BUFFER each where a row is smaller, converting each."""
        rows = entry.shape[0] if entry.shape else 1
        target = out if entry.shape else out.view(1)
        if not entry.size:
            return
        row = entry.size // rows
        if row > BUFFER and len(entry.shape) > 1:  # a stack of matrices: piece by piece within each
            part = Entry(entry.name, entry.dtype, entry.shape[1:], entry.path, entry.offset, row)
            for index in range(rows):
                piece = Entry(part.name, part.dtype, part.shape, part.path, entry.offset + index * row, row)
                self._convert(piece, target[index])
            return
        count = max(1, BUFFER // row)
        buffer = torch.empty(min(count, rows) * row, dtype=torch.uint8)
        for start in range(0, rows, count):
            stop = min(rows, start + count)
            raw = buffer[: (stop - start) * row]
            self._pread(entry, start * row, raw)
            target[start:stop].copy_(raw.view(entry.dtype).view(stop - start, *entry.shape[1:]))

    def _pread(self, entry: Entry, start: int, raw: torch.Tensor) -> None:
        view, place = memoryview(raw.numpy().data), entry.offset + start
        file = self._open(entry.path)
        done = 0
        while done < len(view):
            got = os.preadv(file, [view[done : done + (64 << 20)]], place + done)
            if not got:
                raise WrongInputError(
                    f"{entry.path}: cut short while {entry.name} was read", "download the model again"
                )
            done += got
        self.bytes_read += done

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            # No read-ahead: what lies behind a tensor is another rank's.
            os.posix_fadvise(self._files[path], 0, 0, os.POSIX_FADV_RANDOM)
        return self._files[path]

    def _forget(self, entry: Entry) -> None:
        if entry.path in self._files:
            os.posix_fadvise(self._files[entry.path], entry.offset, entry.size, os.POSIX_FADV_DONTNEED)


def _files(folder: Path) -> list[Path]:
    index = folder / tensors.INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    if (folder / tensors.SINGLE).is_file():
        return [folder / tensors.SINGLE]
    raise WrongInputError(
        f"{folder}: no {tensors.SINGLE} and no {tensors.INDEX} in it",
        "only safetensors are loaded; convert pickled (.bin, .pt) checkpoints first",
    )


def _entries(path: Path) -> Iterable[Entry]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if about["dtype"] not in DTYPES:
            raise WrongInputError(
                f"{path}: {name} is of type {about['dtype']}, which is not known here", "take another checkpoint"
            )
        begin, end = about["data_offsets"]
        yield Entry(name, DTYPES[about["dtype"]], tuple(about["shape"]), path, 8 + length + begin, end - begin)
