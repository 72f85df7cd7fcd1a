"""The tensors of a checkpoint: name, type, shape and size of each, from safetensors headers; no tensor data is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from cluster.errors import WrongInputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The safetensors format: 8 bytes little-endian length, then that many bytes of JSON (at most 100 MB by the reference reader).
_HEADER_LIMIT = 100_000_000
_BROKEN = "download the model again"


class Tensor(NamedTuple):  # not a dataclass: a large mixture has forty thousand, and half a second is all there is
    """One tensor: `dtype` as safetensors spells it (BF16, F8_E4M3, U8), `size` in bytes as stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def of_folder(folder: Path) -> list[Tensor] | None:
    """Every tensor of a local folder's safetensors; None where it has none.

    Raises:
        WrongInputError: an index that is none, or names a file that is not there; a truncated or damaged file.
    """
    try:
        files = _files(folder)
        return None if files is None else [tensor for file in files for tensor in of_file(file)]
    except OSError as error:
        raise WrongInputError(f"{folder}: cannot be read ({error})", "check the folder's permissions") from None


def _files(folder: Path) -> list[Path] | None:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise WrongInputError(f"{index}: is no safetensors index", _BROKEN) from None
        if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise WrongInputError(f"{index}: names {strange[0]!r}, which is no plain file name", _BROKEN)
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise WrongInputError(f"{index}: names {absent[0]}, which is not there", _BROKEN)
        return [folder / name for name in names]
    return [folder / SINGLE] if (folder / SINGLE).is_file() else None


def of_file(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file.

    Raises:
        WrongInputError: it is none, cut short, or its header is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _HEADER_LIMIT):
            raise WrongInputError(f"{path}: is no safetensors file, or cut short ({size} bytes)", _BROKEN)
        raw = file.read(length)
    return of_header(raw, size, str(path))


def of_header(raw: bytes, size: int, where: str) -> list[Tensor]:
    """The tensors of a safetensors file of `size` bytes, from its header.

    Raises:
        WrongInputError: the file `where` is cut short, or its header is damaged.
    """
    room, tensors = size - 8 - len(raw), []
    try:
        for name, entry in json.loads(raw).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not {int}.issuperset(map(type, (begin, end, *shape))) or min(begin, end, *shape) < 0:
                raise TypeError(name)  # noqa: TRY301 - told like the other ways to be damaged
            if not begin <= end <= room:
                raise WrongInputError(
                    f"{where}: cut short: tensor {name} ends at byte {8 + len(raw) + end} of {size}", _BROKEN
                )
            tensors.append(Tensor(name, entry.get("dtype", ""), shape, end - begin))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WrongInputError(f"{where}: its safetensors header is damaged", _BROKEN) from None
    return tensors
