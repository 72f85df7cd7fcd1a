"""A safetensors set, written tensor by tensor: a file is closed when it is large enough, the index comes last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO

import torch

from launch.shard.checkpoint import DTYPES
from launch.tensors import INDEX

# Bytes of one file, as the hub's are.
LARGEST = 5 << 30
# The header stands before the tensors but is known after them: room is left for it, and filled with spaces, as the format allows.
_ROOM = 1 << 20
_ENTRY = 160  # bytes that a tensor's line of the header takes besides its name, at most
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Writer:
    """Writes model-00001.safetensors and so on into `folder`; nothing of a tensor is kept once it is added."""

    def __init__(self, folder: Path, largest: int = LARGEST) -> None:
        self.folder, self.largest, self.total = folder, largest, 0
        self._map: dict[str, str] = {}
        self._file: BinaryIO | None = None
        self._files = 0
        self._header: dict[str, object] = {}
        self._place = self._header_size = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor."""
        data = tensor.detach().to("cpu").contiguous()
        size = data.numel() * data.element_size()
        full = self._place + size > self.largest or self._header_size + len(name) + _ENTRY > _ROOM
        if self._file is not None and full and self._place:
            self._end()
        if self._file is None:
            self._begin()
        assert self._file is not None
        if size:
            self._file.write(data.view(-1).view(torch.uint8).numpy().data)
        place = [self._place, self._place + size]
        self._header[name] = {"dtype": _NAMES[data.dtype], "shape": list(data.shape), "data_offsets": place}
        self._header_size += len(name) + _ENTRY
        self._place += size
        self.total += size
        self._map[name] = Path(self._file.name).name

    def close(self) -> None:
        """End the last file and write the index."""
        if self._file is not None:
            self._end()
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(self._map.items()))}
        with (self.folder / INDEX).open("w", encoding="utf-8") as file:
            json.dump(index, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def _begin(self) -> None:
        self._files += 1
        self._header = {"__metadata__": {"format": "pt"}}
        self._place = self._header_size = 0
        self._file = (self.folder / f"model-{self._files:05d}.safetensors").open("wb")
        self._file.seek(8 + _ROOM)

    def _end(self) -> None:
        assert self._file is not None
        raw = json.dumps(self._header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(_ROOM.to_bytes(8, "little") + raw.ljust(_ROOM))
        self._file.flush()
        os.fsync(self._file.fileno())
        # What was written is not read again here, and cached pages count against memory.
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()
        self._file = None
