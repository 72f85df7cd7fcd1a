"""What a model is, read from its config.json and the headers of its safetensors; no torch, no tensor data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import WrongInputError

# The safetensors format: 8 bytes little-endian length, then that many bytes of JSON (at most 100 MB by the reference reader).
_HEADER_LIMIT = 100_000_000
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class ModelCard:
    """Sizes are bytes as the checkpoint stores them."""

    folder: Path
    model_type: str
    layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    tied: bool
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    parameters: int

    @property
    def total_bytes(self) -> int:
        """All tensors of the checkpoint, each counted once."""
        return sum(self.layer_bytes) + self.embedding_bytes + self.head_bytes

    @property
    def head_cost(self) -> int:
        """What the last stage bears besides its layers, in bytes: norm and head, and the embedding again where they are tied."""
        return self.head_bytes + (self.embedding_bytes if self.tied else 0)


@dataclass(frozen=True)
class _Tensor:
    name: str
    elements: int
    size: int


def read(folder: Path) -> ModelCard:
    """Read the card of a local model folder.

    Raises:
        WrongInputError: no folder, no or a broken config.json, no safetensors, a truncated or missing file of theirs.
    """
    config = _config(folder)
    text = config.get("text_config") or config
    layers = _integer(text, "num_hidden_layers", folder)
    tensors = [tensor for file in _files(folder) for tensor in _header(file)]
    layer_bytes = [0] * layers
    embedding = head = 0
    for tensor in tensors:
        if match := _LAYER.search(tensor.name):
            index = int(match[1])
            if index < layers:  # some checkpoints append layers for multi-token prediction, which nobody loads
                layer_bytes[index] += tensor.size
        elif "embed" in tensor.name:
            embedding += tensor.size
        else:
            head += tensor.size
    if not all(layer_bytes):
        empty = layer_bytes.index(0)
        raise WrongInputError(
            f"{folder}: its safetensors hold nothing of layer {empty}, though config.json names {layers} layers",
            "download the model again",
        )
    return ModelCard(
        folder=folder,
        model_type=str(config.get("model_type", "unknown")),
        layers=layers,
        hidden_size=_integer(text, "hidden_size", folder),
        vocab_size=_integer(text, "vocab_size", folder),
        max_positions=text.get("max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        layer_bytes=tuple(layer_bytes),
        embedding_bytes=embedding,
        head_bytes=head,
        parameters=sum(tensor.elements for tensor in tensors),
    )


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise WrongInputError(
            f"{folder}: no such model folder",
            "give `base_model` a folder with config.json and safetensors; `hf download ORG/MODEL --local-dir FOLDER` fetches one",
        )
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WrongInputError(
            f"{folder}: no config.json in it, so it is no model folder", "check `base_model`"
        ) from None
    except (OSError, ValueError) as error:
        raise WrongInputError(f"{path}: cannot be read ({error})", "download the model again") from None
    if not isinstance(config, dict):
        raise WrongInputError(f"{path}: holds no JSON object", "download the model again")
    return config


def _integer(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise WrongInputError(
            f"{folder / 'config.json'}: {key}: expected a positive whole number, found {value!r}",
            "only causal language models can be run",
        )
    return value


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise WrongInputError(f"{index}: is no safetensors index", "download the model again") from None
        if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise WrongInputError(
                f"{index}: names {strange[0]!r}, which is no plain file name", "download the model again"
            )
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise WrongInputError(f"{index}: names {absent[0]}, which is not there", "download the model again")
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise WrongInputError(
        f"{folder}: no {_SINGLE} and no {_INDEX} in it",
        "only safetensors are loaded; convert pickled (.bin, .pt) checkpoints first",
    )


def _header(path: Path) -> list[_Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _HEADER_LIMIT):
            raise WrongInputError(
                f"{path}: is no safetensors file, or cut short ({size} bytes)", "download the model again"
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = []
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            elements = 1
            for dimension in entry["shape"]:
                elements *= dimension
            if not 0 <= begin <= end <= size - 8 - length:
                raise WrongInputError(
                    f"{path}: cut short: tensor {name} ends at byte {8 + length + end} of {size}",
                    "download the model again",
                )
            tensors.append(_Tensor(name, elements, end - begin))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WrongInputError(f"{path}: its safetensors header is damaged", "download the model again") from None
    return tensors
