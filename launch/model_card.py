"""What a model is, from its config.json and, where there are any, the headers of its safetensors; no torch, no tensor data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import NamedTuple

from cluster.errors import WrongInputError
from launch import architecture, kv_cache, model_config, tensors, weights
from launch.architecture import Shape
from launch.contents import ADAPTER, Contents
from launch.kv_cache import LayerCache
from launch.model_config import ModelConfig
from launch.precision import ELEMENT_BYTES, TORCH_TYPES, Kind, Weight
from launch.tensors import Tensor

_LAYER = re.compile(r"layers\.(\d{1,9})\.")
_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"
EMBEDDING, HEAD = -1, -2  # where a tensor belongs that belongs to no layer
_MOST_LAYERS = 10_000  # far more than any model has: a configuration that names more is broken


@dataclass(frozen=True)
class Part:
    """A layer, the embedding, or the final norm with the head: its weights, and what it keeps of a sequence."""

    weights: tuple[Weight, ...]
    cache: LayerCache | None = None

    @cached_property
    def stored(self) -> int:
        """Bytes as the checkpoint stores them."""
        return sum(weight.stored for weight in self.weights)

    @cached_property
    def parameters(self) -> int:
        """Numbers that were learned."""
        return sum(weight.parameters for weight in self.weights)


@dataclass(frozen=True)
class ModelCard:
    """A model's sizes. Bytes are as the checkpoint stores them; where it is not there, as config.json says that it would.

    `source` is a folder or a hub's id. `quantized` names how the checkpoint was quantised (None: it was not).
    """

    source: str
    model_type: str
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    tied: bool
    stack: tuple[Part, ...]
    embedding: Part
    head: Part
    experts: int = 0
    experts_per_token: int = 0
    heads: int | None = None
    quantized: str | None = None
    has_weights: bool = True

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(self.source)

    @property
    def name(self) -> str:
        """What people call it."""
        return PurePath(self.source).name

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return len(self.stack)

    @cached_property
    def kinds(self) -> tuple[Part, ...]:
        """The layers that differ: those that are alike are one object."""
        return tuple({id(part): part for part in self.stack}.values())

    @cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes of each layer."""
        return tuple(part.stored for part in self.stack)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the token embedding."""
        return self.embedding.stored

    @property
    def head_bytes(self) -> int:
        """Bytes of final norm and head; without the embedding, where the head is that."""
        return self.head.stored

    @cached_property
    def parameters(self) -> int:
        """Of the whole model, each counted once."""
        return sum(part.parameters for part in self.parts)

    @cached_property
    def active(self) -> float:
        """Parameters that one token goes through: of a mixture only the experts that it is sent to, of the embedding one row."""
        share = self.experts_per_token / self.experts if self.experts else 1.0
        inside = sum(
            weight.parameters * (share if weight.kind is Kind.EXPERT else 1.0)
            for part in self.stack
            for weight in part.weights
        )
        return inside + self.head.parameters + (self.embedding.parameters if self.tied else 0)

    @property
    def parts(self) -> Iterable[Part]:
        """Embedding, layers and head."""
        return (self.embedding, *self.stack, self.head)

    @cached_property
    def total_bytes(self) -> int:
        """What is loaded of the checkpoint, each tensor counted once."""
        return sum(part.stored for part in self.parts)

    @property
    def head_cost(self) -> int:
        """What the last stage bears besides its layers, in bytes: norm and head, and the embedding again where they are tied."""
        return self.head_bytes + (self.embedding_bytes if self.tied else 0)


def read(folder: Path, *, needs_weights: bool = True) -> ModelCard:
    """Read the card of a local model folder; with `needs_weights` False its safetensors need not be there.

    Raises:
        WrongInputError: no folder, no or a broken config.json, no safetensors, a truncated or missing file of theirs, or
            not the tensors of a stack of layers.
        RefusedError: it is quantised in a way that cannot be loaded.
    """
    config = _config(folder)
    found = tensors.of_folder(folder)
    if found is not None:
        return of_tensors(config, found, str(folder))
    absent = f"{folder}: no {tensors.SINGLE} and no {tensors.INDEX} in it"
    if needs_weights:
        raise WrongInputError(absent, "only safetensors are loaded; convert pickled (.bin, .pt) checkpoints first")
    try:
        return of_config(config, str(folder))
    except WrongInputError as error:
        reason = error.message.removeprefix(f"{config.where}: ")
        raise WrongInputError(f"{absent}, and config.json alone does not do: {reason}", error.fix) from None


def of_contents(contents: Contents, source: str) -> ModelCard:
    """The card of a folder that lies on a node, from what was seen there.

    Raises:
        WrongInputError, RefusedError: see `read`.
    """
    config = config_of(contents, source)
    if contents.broken:
        raise WrongInputError(contents.broken, "download the model again")
    if not contents.headers:
        raise WrongInputError(
            f"{source}: no {tensors.SINGLE} and no {tensors.INDEX} in it",
            "only safetensors are loaded; convert pickled (.bin, .pt) checkpoints first",
        )
    return of_tensors(config, tensors_of(contents, source), source)


def config_of(contents: Contents, source: str) -> ModelConfig:
    """The configuration in a folder that lies on a node.

    Raises:
        WrongInputError: there is none, or it is broken.
    """
    if contents.config is None:
        raise WrongInputError(f"{source}: no config.json in it, so it is no model folder", "check `base_model`")
    return model_config.parse(contents.config, f"{source}/config.json")


def tensors_of(contents: Contents, source: str) -> list[Tensor]:
    """Every tensor of a folder that lies on a node.

    Raises:
        WrongInputError: a file is cut short, or its header damaged.
    """
    return [
        tensor
        for name, header in contents.headers.items()
        for tensor in tensors.of_header(header, contents.files[name].size, f"{source}/{name}")
    ]


def of_config(config: ModelConfig, source: str) -> ModelCard:
    """The card of a model of which only the configuration is at hand.

    Raises:
        WrongInputError: the model_type is not known so well, or a key is missing or wrong.
        RefusedError: it is quantised in a way that cannot be loaded.
    """
    family = architecture.family_of(config)
    if family is None or config.layers > _MOST_LAYERS:
        raise architecture.unknown(config)
    method = weights.quantization(config)
    tied = family.tied if config.tied is None else config.tied
    dtype = TORCH_TYPES.get(config.dtype, "BF16")

    def made(shapes: Iterable[Shape]) -> list[Tensor]:
        return [Tensor(name, dtype, shape, math.prod(shape) * ELEMENT_BYTES[dtype]) for name, shape in shapes]

    outside = made(architecture.around(config, tied=tied))
    stack: dict[tuple[Shape, ...], tuple[Weight, ...]] = {}  # layers are mostly alike: each kind is worked out once
    layers = []
    for index in range(config.layers):
        shapes = tuple(architecture.layer(config, family, index))
        if shapes not in stack:
            named = ((tensor.name, tensor) for tensor in made(shapes))
            stack[shapes] = weights.as_stored(weights.of_layer(named), method)
        layers.append(stack[shapes])
    sorted_out = _Sorted(layers, outside[:1], outside[1:])
    return _card(config, sorted_out, source, tied=tied, method=method, has_weights=False)


def of_tensors(config: ModelConfig, found: Sequence[Tensor], source: str) -> ModelCard:
    """The card of a model whose checkpoint holds the tensors `found`.

    Raises:
        WrongInputError: they are not those of the stack of layers that the configuration describes.
        RefusedError: it is quantised in a way that cannot be loaded.
    """
    method = weights.quantization(config)
    tied = is_tied(config, found)
    sorted_out = _sort(config, found, source, tied=tied, method=method)
    return _card(config, sorted_out, source, tied=tied, method=method)


def is_tied(config: ModelConfig, found: Sequence[Tensor]) -> bool:
    """Whether the head is the embedding. Where the configuration leaves it to its class, the tensors tell."""
    said = config.tied
    return not any(tensor.name.endswith(_HEAD) for tensor in found) if said is None else said


def adapter_elements(folder: Path, layers: int) -> tuple[int, ...]:
    """How many numbers a PEFT adapter has for each of a model's layers.

    Raises:
        WrongInputError: the folder is no adapter of safetensors.
    """
    path = folder / "adapter_model.safetensors"
    try:
        found = tensors.of_file(path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise WrongInputError(
            f"{folder}: is no PEFT adapter folder ({path.name}: {reason})",
            "give `adapter_path` the adapter/ folder of a job",
        ) from None
    return _elements(found, layers)


def adapter_elements_of(contents: Contents, layers: int) -> tuple[int, ...]:
    """The same of an adapter's folder on a node.

    Raises:
        WrongInputError: the folder is no adapter of safetensors.
    """
    if ADAPTER not in contents.headers:
        raise WrongInputError(
            f"{contents.path}: is no PEFT adapter folder (no {ADAPTER} in it)",
            "give `adapter_path` the adapter/ folder of a job",
        )
    return _elements(tensors_of(contents, contents.path), layers)


def _elements(found: Iterable[Tensor], layers: int) -> tuple[int, ...]:
    elements = [0] * layers
    for tensor in found:
        layer = _LAYER.search(tensor.name)
        if layer and int(layer[1]) < layers:
            elements[int(layer[1])] += math.prod(tensor.shape)
    return tuple(elements)


class _Sorted(NamedTuple):
    layers: list[tuple[Weight, ...]]
    embedding: list[Tensor]
    head: list[Tensor]


def _sort(config: ModelConfig, found: Sequence[Tensor], source: str, *, tied: bool, method: str | None) -> _Sorted:
    """Say of every tensor where it belongs."""
    layers = config.layers
    stack: dict[int, list[tuple[str, Tensor]]] = {}
    embedding: list[Tensor] = []
    head: list[Tensor] = []
    for tensor, where, name in placed(found, layers, source, tied=tied):
        if where >= 0:
            stack.setdefault(where, []).append((name, tensor))
        else:
            (embedding if where == EMBEDDING else head).append(tensor)
    absent = next((index for index in range(layers) if index not in stack), None)
    if absent is not None:
        raise WrongInputError(
            f"{source}: its safetensors hold nothing of layer {absent}, though config.json names {layers} layers",
            "download the model again",
        )
    # 4-bit formats hold a matrix packed, in another shape.
    family = architecture.family_of(config) if method in ("nf4", "mxfp4") else None
    made = []
    for index in range(layers):
        shapes = dict(architecture.layer(config, family, index)) if family is not None else {}
        made.append(weights.of_layer(stack[index], method, shapes))
    return _Sorted(made, embedding, head)


def placed(found: Sequence[Tensor], layers: int, source: str, *, tied: bool) -> Iterator[tuple[Tensor, int, str]]:
    """The tensors that are loaded, each with the layer that it belongs to, or EMBEDDING or HEAD, and its name there.

    Raises:
        WrongInputError: they are not those of a stack of layers.
    """
    decoder = _decoder_prefix(found, source)
    place = re.compile(rf"{re.escape(decoder)}layers\.(\d{{1,9}})\.")
    for tensor in found:
        name = tensor.name
        if layer := place.match(name):
            # Some checkpoints append layers for multi-token prediction, which nobody loads.
            if (index := int(layer[1])) < layers:
                yield tensor, index, name[layer.end() :]
        elif not (tied and name.endswith(_HEAD)):  # stored twice, but held once
            is_embedding = name.startswith(decoder) and "embed" in name[len(decoder) :]
            yield tensor, EMBEDDING if is_embedding else HEAD, name


def _decoder_prefix(found: Sequence[Tensor], source: str) -> str:
    """What the names of the decoder's tensors begin with: a vision tower beside it may have layers of its own."""
    embeddings = [tensor.name.removesuffix(_EMBEDDING) for tensor in found if tensor.name.endswith(_EMBEDDING)]
    if not embeddings:
        raise WrongInputError(
            f"{source}: its safetensors hold no {_EMBEDDING}, so the model is no plain stack of layers",
            "only decoders with one embedding, one list of layers and one final norm can be run",
        )
    return min(embeddings, key=len)  # layers for multi-token prediction may bring a copy


def _card(
    config: ModelConfig, parts: _Sorted, source: str, *, tied: bool, method: str | None, has_weights: bool = True
) -> ModelCard:
    caches: Sequence[LayerCache | None] = [None] * config.layers
    if config.optional("num_attention_heads"):
        caches = kv_cache.caches(config, architecture.family_of(config))
    alike: dict[Part, Part] = {}  # one object for all layers that are the same, so that their sizes are worked out once
    stack = [Part(own, cache) for own, cache in zip(parts.layers, caches, strict=True)]
    return ModelCard(
        source=source,
        model_type=config.model_type,
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.optional("max_position_embeddings"),
        tied=tied,
        stack=tuple(alike.setdefault(part, part) for part in stack),
        embedding=Part(weights.of_ends(parts.embedding)),
        head=Part(weights.of_ends(parts.head)),
        experts=architecture.experts(config),
        experts_per_token=architecture.experts_per_token(config),
        heads=config.optional("num_attention_heads"),
        quantized=method,
        has_weights=has_weights,
    )


def _config(folder: Path) -> ModelConfig:
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
        raw = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise WrongInputError(
            f"{folder}: no config.json in it, so it is no model folder", "check `base_model`"
        ) from None
    except (OSError, ValueError) as error:
        raise WrongInputError(f"{path}: cannot be read ({error})", "download the model again") from None
    return model_config.parse(raw, str(path))
