"""Which tensors of a checkpoint make which parameter of a stage: renamed, or many experts' matrices in one fused tensor.

The rules are transformers' own, by architecture; what is read here is what its loader would ask for, without its copies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from cluster.errors import WrongInputError
from launch.precision import NF4_BLOCK
from launch.shard import mxfp4, nf4
from launch.shard.checkpoint import Checkpoint, Entry

AGAIN = "download the model again, or check that its safetensors belong to its config.json"


@dataclass(frozen=True)
class Origin:
    """What makes the parameter `target`.

    `groups` holds its tensors: one of one tensor, where it is only renamed; else, for each part of a fused expert (gate, then up),
    those of all experts in order. `plain` is False where transformers must convert in another way. `statistics` are what a
    quantised checkpoint stores beside it, by what their names end with.
    """

    target: str
    groups: tuple[tuple[Entry, ...], ...]
    plain: bool = True
    statistics: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All of its tensors."""
        return tuple(entry for group in self.groups for entry in group)

    @property
    def is_nf4(self) -> bool:
        """Whether it comes in bitsandbytes' NF4, or an expert in ours."""
        return "absmax" in self.statistics

    @property
    def is_mxfp4(self) -> bool:
        """Whether it comes as blocks and scales of MXFP4."""
        return "_scales" in self.statistics

    @property
    def fused(self) -> bool:
        """Whether it is made of more than one tensor, or of one by more than its name."""
        return len(self.entries) > 1 or not self.plain

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what they make, where that is `plain`."""
        first = self.groups[0][0].shape
        if not self.fused:
            return first
        return (len(self.groups[0]), sum(group[0].shape[0] for group in self.groups), *first[1:])


# What a quantised checkpoint adds to a weight's name: bitsandbytes, FP8, MXFP4.
_STATISTIC = re.compile(
    r"(?:\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\w+)|(_scale_inv)|(_blocks)|(_scales))$"
)


def origins(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Origin]:
    """Each parameter of `model` (on the meta device) with what makes it; parameters of other stages are left out."""
    held = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}

    def target_of(name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, held)
        return (name, None) if target not in held and name in held else (target, pattern)

    found: dict[str, dict[str | None, list[Entry]]] = {}
    statistics: dict[str, dict[str, Entry]] = {}
    for name in sorted(checkpoint.entries, key=natural):
        entry = checkpoint.entries[name]
        target, pattern = target_of(name)
        suffix = _STATISTIC.search(name)
        if target not in held and suffix:
            target, pattern = target_of(name[: suffix.start()])
            kind = next(group for group in suffix.groups() if group)
            if target in held and kind != "_blocks":
                statistics.setdefault(target, {})[kind] = entry
                continue
        if target in held:
            found.setdefault(target, {}).setdefault(pattern, []).append(entry)
    made = {target: _origin(target, groups, by_pattern) for target, groups in found.items()}
    for target, origin in made.items():
        if origin.plain and origin.fused and target_of(target) != (target, None):
            made[target] = replace(origin, plain=False)  # transformers would take the finished tensor for another
        if target in statistics:
            made[target] = replace(made[target], statistics=statistics[target])
    return made


def natural(name: str) -> Any:
    """A key that sorts names by the numbers in them, as transformers does."""
    return dot_natural_key(name)


def _origin(target: str, groups: dict[str | None, list[Entry]], rules: Mapping[str, WeightConverter]) -> Origin:
    patterns = [pattern for pattern in groups if pattern is not None]
    if not patterns:
        return Origin(target, ((groups[None][0],),))
    rule = rules[patterns[0]]
    kinds = [type(operation) for operation in rule.operations]
    dims = [getattr(operation, "dim", None) for operation in rule.operations]
    ordered = tuple(tuple(groups[pattern]) for pattern in rule.source_patterns if pattern in groups)
    stacked = kinds == [MergeModulelist] and dims == [0] and len(ordered) == 1
    joined = kinds == [MergeModulelist, Concatenate] and dims == [0, 1] and len(ordered) == len(rule.source_patterns)
    return Origin(target, ordered, plain=(stacked or joined) and len(rule.target_patterns) == 1)


def check(model: PreTrainedModel, made: Mapping[str, Origin], folder: Any, what: object) -> None:
    """Make sure that every parameter of the stage is there, whole and of its shape, before any memory is taken.

    Raises:
        WrongInputError: it is not; the first that is wrong is named.
    """
    held = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    later = {name for source in made.values() if not source.plain for name in _others(source, held)}
    missing = sorted(set(held) - set(made) - tied - later - _optional(model))
    if missing:
        raise WrongInputError(
            f"{folder}: {len(missing)} tensors of {what} are not in the checkpoint, first {missing[0]}", AGAIN
        )
    for target, source in made.items():
        if source.is_nf4:
            _check_packed(source, tuple(held[target].shape), folder)
        elif source.plain and not source.statistics:
            _check_shape(source, tuple(held[target].shape), folder)


def _check_packed(origin: Origin, expected: tuple[int, ...], folder: Any) -> None:
    stored = math.ceil(math.prod(expected) / 2)
    if origin.entries[0].size != stored:
        raise WrongInputError(
            f"{folder}: {origin.entries[0].name} has {origin.entries[0].size} bytes, but {_by(expected)} in NF4 take {stored}",
            AGAIN,
        )
    needed = ("absmax", "nested_absmax", "quant_state.nested_offset") if len(expected) == 3 else ("absmax",)
    for name in needed:
        if name not in origin.statistics:
            raise WrongInputError(f"{folder}: {origin.entries[0].name}.{name} is not in the checkpoint", AGAIN)


def _check_shape(source: Origin, expected: tuple[int, ...], folder: Any) -> None:
    for group in source.groups:
        if len(group) != len(source.groups[0]) or (source.fused and len(group) != expected[0]):
            raise WrongInputError(
                f"{folder}: {source.target} is made of {expected[0]} experts, but the checkpoint has {len(group)} "
                f"like {group[0].name}",
                AGAIN,
            )
        for entry in group:
            if entry.shape != group[0].shape:
                raise WrongInputError(f"{folder}: {entry.name} is {_by(entry.shape)}, not {_by(group[0].shape)}", AGAIN)
    if source.shape != expected:
        names = source.groups[0][0].name
        raise WrongInputError(
            f"{folder}: {names} is {_by(source.shape)}, but config.json makes {source.target} {_by(expected)}", AGAIN
        )


def _others(source: Origin, held: Iterable[str]) -> list[str]:
    """Names that a conversion other than fusing may make besides its target: those of the same module."""
    module = source.target.rpartition(".")[0].rpartition(".")[0]
    return [name for name in held if name.startswith(module + ".")]


def _optional(model: PreTrainedModel) -> set[str]:
    """Buffers that a checkpoint need not have, as transformers says."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
    return {name for name in model.state_dict() if any(re.search(pattern, name) for pattern in patterns)}


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


class Lazy:
    """Stands for a tensor among those that transformers loads, and is read when it is asked for."""

    def __init__(
        self, checkpoint: Checkpoint, source: Origin, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        self._checkpoint, self._source, self._dtype, self._device = checkpoint, source, dtype, device

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        if not self._source.fused:
            entry = self._source.entries[0]
            return self._checkpoint.load(entry, self._dtype if entry.dtype.is_floating_point else None, self._device)
        out = torch.empty(self._source.shape, dtype=self._dtype, device=self._device)
        for index in range(out.shape[0]):
            read_expert(self._checkpoint, self._source, index, out[index])
        return out

    def get_shape(self) -> list[int]:
        return list(self._source.shape)

    def get_dtype(self) -> str:
        return str(self._dtype)


def read_expert(checkpoint: Checkpoint, origin: Origin, index: int, out: torch.Tensor) -> None:
    """Read one expert's matrices of a fused parameter, each straight into its rows of `out`."""
    if not origin.fused:
        checkpoint.read(part(origin.entries[0], index), out)
        return
    start = 0
    for group in origin.groups:
        entry = group[index]
        checkpoint.read(entry, out[start : start + entry.shape[0]])
        start += entry.shape[0]


def pieces(
    checkpoint: Checkpoint, origin: Origin, index: int | None, dtype: torch.dtype, device: torch.device
) -> Iterator[torch.Tensor]:
    """The elements of a parameter, or of its expert `index`, in order, in flat pieces that NF4 takes one by one."""
    if origin.is_mxfp4:
        assert index is not None
        blocks = checkpoint.load(part(origin.entries[0], index), None, device)
        scales = checkpoint.load(part(origin.statistics["_scales"], index), None, device)
        yield from nf4.split(mxfp4.unpack(blocks, scales, dtype))
        return
    if index is None or not origin.fused:
        entries = [origin.entries[0] if index is None else part(origin.entries[0], index)]
    else:
        entries = [group[index] for group in origin.groups]
    counts = [math.prod(entry.shape) for entry in entries]
    if any(count % NF4_BLOCK for count in counts[:-1]):  # a block would reach from one into the next
        matrices = [checkpoint.load(entry, dtype, device).view(-1) for entry in entries]
        yield from nf4.split(torch.cat(matrices))
        return
    room = torch.empty(min(nf4.PIECE, max(counts)), dtype=dtype, device=device)
    for entry, count in zip(entries, counts, strict=True):
        width = entry.size // count
        for start in range(0, count, nf4.PIECE):
            length = min(nf4.PIECE, count - start)
            piece = replace(entry, shape=(length,), offset=entry.offset + start * width, size=length * width)
            checkpoint.read(piece, room[:length])
            yield room[:length]


def part(entry: Entry, index: int) -> Entry:
    """The entry of one of the tensors that are stacked in `entry`."""
    size = entry.size // entry.shape[0]
    return replace(entry, shape=entry.shape[1:], offset=entry.offset + index * size, size=size)
