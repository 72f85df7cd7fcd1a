"""What a model is, read from its config.json and the headers of its safetensors; no torch, no tensor data."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import WrongInputError

# The safetensors format: 8 bytes little-endian length, then that many bytes of JSON (at most 100 MB by the reference reader).
_HEADER_LIMIT = 100_000_000
_LAYER = re.compile(r"layers\.(\d{1,9})\.")
_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"
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
        """What is loaded of the checkpoint, each tensor counted once."""
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
        WrongInputError: no folder, no or a broken config.json, no safetensors, a truncated or missing file of theirs, or
            not the tensors of a stack of layers.
    """
    config = _config(folder)
    text = _object(config, "text_config", folder) or config
    layers = _integer(text, "num_hidden_layers", folder)
    try:
        tensors = [tensor for file in _files(folder) for tensor in _header(file)]
    except OSError as error:
        raise WrongInputError(f"{folder}: cannot be read ({error})", "check the folder's permissions") from None
    tied = _is_tied(config, text, tensors)
    sizes = _measure(tensors, _decoder_prefix(tensors, folder), layers, tied)
    absent = next((index for index in range(layers) if not sizes.layers[index]), None)
    if absent is not None:
        raise WrongInputError(
            f"{folder}: its safetensors hold nothing of layer {absent}, though config.json names {layers} layers",
            "download the model again",
        )
    bounded = text.get("max_position_embeddings") is not None
    return ModelCard(
        folder=folder,
        model_type=str(config.get("model_type", "unknown")),
        layers=layers,
        hidden_size=_integer(text, "hidden_size", folder),
        vocab_size=_integer(text, "vocab_size", folder),
        max_positions=_integer(text, "max_position_embeddings", folder) if bounded else None,
        tied=tied,
        layer_bytes=tuple(sizes.layers[index] for index in range(layers)),
        embedding_bytes=sizes.embedding,
        head_bytes=sizes.head,
        parameters=sizes.parameters,
    )


@dataclass
class _Sizes:
    layers: Counter[int] = field(default_factory=Counter)
    embedding: int = 0
    head: int = 0
    parameters: int = 0


def _measure(tensors: Sequence[_Tensor], decoder: str, layers: int, tied: bool) -> _Sizes:
    sizes = _Sizes()
    for tensor in tensors:
        inside = tensor.name.removeprefix(decoder) if tensor.name.startswith(decoder) else ""
        layer = _LAYER.match(inside)
        if layer and int(layer[1]) >= layers:
            continue  # some checkpoints append layers for multi-token prediction, which nobody loads
        if tied and tensor.name.endswith(_HEAD):
            continue  # stored twice, but held once
        if layer:
            sizes.layers[int(layer[1])] += tensor.size
        elif "embed" in inside:
            sizes.embedding += tensor.size
        else:
            sizes.head += tensor.size
        sizes.parameters += tensor.elements
    return sizes


def _decoder_prefix(tensors: Sequence[_Tensor], folder: Path) -> str:
    """What the names of the decoder's tensors begin with: a vision tower beside it may have layers of its own."""
    found = [tensor.name.removesuffix(_EMBEDDING) for tensor in tensors if tensor.name.endswith(_EMBEDDING)]
    if not found:
        raise WrongInputError(
            f"{folder}: its safetensors hold no {_EMBEDDING}, so the model is no plain stack of layers",
            "only decoders with one embedding, one list of layers and one final norm can be run",
        )
    return min(found, key=len)  # layers for multi-token prediction may bring a copy


def _is_tied(config: Mapping[str, Any], text: Mapping[str, Any], tensors: Sequence[_Tensor]) -> bool:
    """Whether the head is the embedding. Where the configuration leaves that to its class, the tensors tell."""
    said = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return not any(tensor.name.endswith(_HEAD) for tensor in tensors) if said is None else bool(said)


def _config(folder: Path) -> dict[str, Any]:
    try:
        is_there = folder.is_dir()
    except OSError:  # a name too long for any folder, one above it that may not be entered
        is_there = False
    if not is_there:
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
    except (OSError, ValueError, RecursionError) as error:
        raise WrongInputError(f"{path}: cannot be read ({error})", "download the model again") from None
    if not isinstance(config, dict):
        raise WrongInputError(f"{path}: holds no JSON object", "download the model again")
    return config


def _object(config: Mapping[str, Any], key: str, folder: Path) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise WrongInputError(
            f"{folder / 'config.json'}: {key}: expected an object, found {value!r}", "download the model again"
        )
    return value


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
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
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
            shape = entry["shape"]
            if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)):
                raise TypeError(name)  # noqa: TRY301 - told like the other ways to be damaged
            if not begin <= end <= size - 8 - length:
                raise WrongInputError(
                    f"{path}: cut short: tensor {name} ends at byte {8 + length + end} of {size}",
                    "download the model again",
                )
            tensors.append(_Tensor(name, math.prod(shape), end - begin))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WrongInputError(f"{path}: its safetensors header is damaged", "download the model again") from None
    return tensors
