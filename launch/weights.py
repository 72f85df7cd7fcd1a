"""What each tensor of a checkpoint is, quantised or not: linear layers, experts, and what is never quantised."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from cluster.errors import RefusedError
from launch.model_config import ModelConfig
from launch.precision import Kind, Weight, nf4_size
from launch.tensors import Tensor

_EXPERT = re.compile(r"(^|\.)experts\.")
_ROUTERS = ("gate", "router")
# What a quantised checkpoint stores beside a weight, after the weight's own name: bitsandbytes, FP8, MXFP4.
_STATISTICS = re.compile(
    r"(\.absmax|\.nested_absmax|\.quant_map|\.nested_quant_map|\.quant_state\.[\w.]+|_scale_inv|_scales)$"
)
_PACKED = "_blocks"  # MXFP4's name for the elements themselves
_FP8_BLOCK = 128  # a 32-bit scale for each block of 128 x 128 (DeepSeek-V3, arXiv:2412.19437)
_MXFP4_BLOCK = 32  # an 8-bit scale for each 32 elements (OCP Microscaling Formats, v1.0)


def quantization(config: ModelConfig) -> str | None:
    """How the checkpoint was quantised: nf4, fp8, mxfp4, or None.

    Raises:
        RefusedError: otherwise, in a way that cannot be loaded.
    """
    method = config.quantization.get("quant_method")
    if method is None:
        return None
    if method == "bitsandbytes" and config.quantization.get("load_in_4bit"):
        return "nf4"
    if method in ("fp8", "mxfp4"):
        return str(method)
    raise RefusedError(
        f"{config.where}: quantised with {method!r}, which cannot be loaded in stages",
        "take the 16-bit checkpoint, with `quantization: nf4` or `adapter: qlora`",
    )


@dataclass(slots=True)
class _Sum:
    """A weight while its tensors are gathered: a mixture's experts may be many thousands."""

    kind: Kind
    parameters: int = 0
    stored: int = 0
    rows: int = 0
    columns: int = 0
    packed: bool = False


def of_layer(
    tensors: Iterable[tuple[str, Tensor]],
    method: str | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Weight, ...]:
    """The weights of one layer by name, its experts as one, statistics of a quantisation with the weight that they belong to.

    Args:
        tensors: with their names within the layer.
        method: how they were quantised.
        shapes: of the matrices, where `tensors` hold them packed.
    """
    sums: dict[str, _Sum] = {}
    for given, tensor in tensors:
        name, kind, is_statistic = _place(given, len(tensor.shape), method is not None)
        own = sums.get(name)
        if own is None:
            own = sums[name] = _Sum(kind)
        own.stored += tensor.size
        if is_statistic:
            continue
        own.kind = kind  # a statistic, of another shape, may have come first
        shape, elements = tensor.shape, math.prod(tensor.shape)
        if method is not None and tensor.dtype in ("U8", "F8_E4M3"):
            own.packed = True
            if tensor.dtype == "U8":  # two elements in each byte
                shape, elements = (shapes or {}).get(given.removesuffix(_PACKED), ()), 2 * elements
        if kind is not Kind.BUFFER:
            own.parameters += elements
        if len(shape) > 1 and shape[-2] * shape[-1] > own.rows * own.columns:
            own.rows, own.columns = shape[-2:]
    return tuple(
        # transformers fuses experts into two tensors, however many the checkpoint has.
        Weight(name, s.kind, s.parameters, s.stored, s.rows, s.columns, 2 if s.kind is Kind.EXPERT else 1, s.packed)
        for name, s in sorted(sums.items())
    )


@lru_cache(maxsize=4096)
def _place(given: str, dimensions: int, quantized: bool) -> tuple[str, Kind, bool]:
    """Of a tensor's name within a layer: its weight's name and kind, and whether it is a statistic of that one's quantisation."""
    name = _STATISTICS.sub("", given) if quantized else given
    weight = name.removesuffix(_PACKED)
    kind = _kind(weight, dimensions)
    return "experts" if kind is Kind.EXPERT else weight, kind, name != given


def of_ends(tensors: Iterable[Tensor]) -> tuple[Weight, ...]:
    """The weights outside of the layers: embedding, final norm, head. They are never quantised."""
    return tuple(
        Weight(name, Kind.OTHER, math.prod(shape), size, *(shape if len(shape) == 2 else (0, 0)))
        for name, _, shape, size in sorted(tensors)
    )


def as_stored(weights: Iterable[Weight], method: str | None) -> tuple[Weight, ...]:
    """The same weights as a checkpoint of this quantisation stores them; for when there is none to look at."""
    return tuple(_quantized(weight, method) for weight in weights)


def _quantized(weight: Weight, method: str | None) -> Weight:
    kinds = {"nf4": (Kind.LINEAR,), "fp8": (Kind.LINEAR, Kind.EXPERT), "mxfp4": (Kind.EXPERT,)}
    if method is None or weight.kind not in kinds[method]:
        return weight
    count = weight.parameters
    if method == "nf4":
        stored = nf4_size(count, weight.matrices)
    elif method == "mxfp4":
        stored = math.ceil(count / 2) + math.ceil(count / _MXFP4_BLOCK)
    else:
        blocks = math.ceil(weight.rows / _FP8_BLOCK) * math.ceil(weight.columns / _FP8_BLOCK)
        alike = count / (weight.rows * weight.columns)
        stored = count + math.ceil(4 * blocks * alike)
    return replace(weight, stored=stored, packed=True)


def _kind(name: str, dimensions: int) -> Kind:
    module = name.split(".")[-2] if "." in name else ""
    if name.endswith("e_score_correction_bias"):
        return Kind.BUFFER
    if _EXPERT.search(name) and not name.endswith("bias"):
        return Kind.EXPERT
    if dimensions == 2 and name.endswith(".weight") and module not in _ROUTERS and "norm" not in module:
        return Kind.LINEAR
    return Kind.OTHER
