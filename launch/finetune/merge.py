"""An adapter added into the weights that it was trained for: one tensor at a time, so the model need not fit into memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.errors import RefusedError, WrongInputError
from launch.shard import conversion, load, quantize
from launch.shard.checkpoint import Checkpoint, Entry
from launch.shard.stage import load_config
from launch.shard.write import Writer
from launch.split import whole

ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# What peft's LoRA can do besides, and would change how it is merged.
_OTHER = ("use_dora", "modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


@dataclass(frozen=True)
class Merged:
    """What was made: how many bytes, and how many matrices the adapter changed."""

    folder: Path
    size: int
    changed: int


@dataclass(frozen=True)
class _Change:
    a: Entry
    b: Entry


def merge(base: Path, adapter: Path, out: Path, progress: Callable[[int, int], None] | None = None) -> Merged:
    """Write the model of `base` with the LoRA adapter of `adapter` in it to the new folder `out`, which appears when it is whole.

    W + s B A (Hu et al. 2021, LoRA, arXiv:2106.09685), s = alpha / r, or alpha / sqrt(r) with rslora, computed in 32 bits.

    Raises:
        WrongInputError: `out` is there, or the adapter is none, or not of this model.
        RefusedError: the base is quantised, or the adapter is of a kind that is not merged here.
    """
    if out.exists():
        raise WrongInputError(f"{out}: is there already", "name a folder that is not, or remove it")
    scale = _scale(adapter)
    config = load_config(base)
    if (method := load.method_of(config)) is not None:
        raise RefusedError(
            f"{base}: comes in {method.upper()}, into which nothing can be added",
            "name the 16-bit model with --base; serve the adapter beside a quantised one with `adapter_path`",
        )
    model, own = Checkpoint(base), Checkpoint.of_file(adapter / ADAPTER)
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        sketch = load.sketched(load.causal_class(config, base), config, whole(quantize.layers(config)), torch.bfloat16)
        origins = conversion.origins(sketch, model)
        conversion.check(sketch, origins, base, "the model")
        changes = _changes(own, adapter)
        named = {origin.entries[0].name: changes.pop(name) for name, origin in origins.items() if name in changes}
        if changes:
            raise WrongInputError(
                f"{adapter}: changes {next(iter(changes))}, which {base} does not have", "it is of another model"
            )
        beside.mkdir(parents=True)
        writer = Writer(beside)
        names = sorted(model.entries, key=conversion.natural)
        for done, name in enumerate(names):
            if progress is not None:
                progress(done, len(names))
            tensor = model.load(model.entries[name])
            writer.add(name, _added(tensor, named[name], own, scale, adapter) if name in named else tensor)
        writer.close()
        quantize.copy_beside(base, beside)
        shutil.copyfile(base / "config.json", beside / "config.json")
        beside.rename(out)
        return Merged(out, writer.total, len(named))
    except OSError as error:
        raise WrongInputError(f"{out}: cannot be written ({error})", "check permissions and free space") from None
    finally:
        model.close()
        own.close()
        shutil.rmtree(beside, ignore_errors=True)


def _scale(adapter: Path) -> float:
    try:
        about: dict[str, Any] = json.loads((adapter / SETTINGS).read_text(encoding="utf-8"))
        rank, alpha = int(about["r"]), float(about["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError):
        raise WrongInputError(f"{adapter}: is no PEFT LoRA folder", "name the adapter/ folder of a job") from None
    if about.get("peft_type") != "LORA" or (other := [name for name in _OTHER if about.get(name)]):
        what = other[0] if about.get("peft_type") == "LORA" else str(about.get("peft_type"))
        raise RefusedError(f"{adapter}: uses {what}, which is not merged here", "merge it with peft")
    return alpha / math.sqrt(rank) if about.get("use_rslora") else alpha / rank


def _changes(own: Checkpoint, adapter: Path) -> dict[str, _Change]:
    """By the parameter that it changes."""
    found = {}
    for name, entry in own.entries.items():
        if not name.endswith(".lora_A.weight"):
            continue
        other = own.entries.get(name.replace(".lora_A.", ".lora_B."))
        if other is None:
            raise WrongInputError(
                f"{adapter}: lacks the other half of {name}", "it is damaged: take another checkpoint"
            )
        found[name.removeprefix(_PREFIX).removesuffix("lora_A.weight") + "weight"] = _Change(entry, other)
    if len(found) * 2 != len(own.entries):
        strange = next(name for name in own.entries if ".lora_" not in name)
        raise RefusedError(f"{adapter}: holds {strange}, which is not merged here", "merge it with peft")
    return found


def _added(tensor: torch.Tensor, change: _Change, own: Checkpoint, scale: float, adapter: Path) -> torch.Tensor:
    a, b = own.load(change.a, torch.float32), own.load(change.b, torch.float32)
    if (b.shape[0], a.shape[1]) != tuple(tensor.shape):
        raise WrongInputError(
            f"{adapter}: {change.a.name} is of another shape than the model's", "it is of another model"
        )
    return (tensor.float() + scale * (b @ a)).to(tensor.dtype)
