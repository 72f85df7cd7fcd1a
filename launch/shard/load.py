"""A stage's tensors go from the checkpoint to where they stay: checked first, then read once, quantised on the way if asked.

transformers' own loader places them (buffers, tied weights and conversions stay its business), but it is handed tensors that
are read straight into their final place when it asks for each, one after the other. What is held in NF4 it never sees.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from cluster.errors import RefusedError, WrongInputError
from launch.shard import conversion, nf4
from launch.shard.checkpoint import Checkpoint
from launch.shard.conversion import Lazy, Origin
from launch.shard.prune import find_decoder, pruned_class
from launch.split import Cut

# Larger tensors are read in the type in which they stay; smaller ones in their own, which transformers converts.
_SMALL = 1 << 20
_ROUTERS = ("gate", "router")  # never quantised: they decide, and are small


def load(
    folder: Path,
    config: PreTrainedConfig,
    cut: Cut,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Literal["nf4"] | None = None,
    quantize_experts: bool = True,
) -> PreTrainedModel:
    """The model of `folder` as far as stage `cut` holds it.

    `quantization` makes 4 bits of what does not come so: linear modules and, with `quantize_experts`, fused experts.

    Raises:
        WrongInputError: the architecture is no language model in layers, or the checkpoint is wrong; nothing was loaded then.
        RefusedError: it is quantised in a way that this device cannot keep.
    """
    architecture = causal_class(config, folder)
    method = method_of(config)
    _refuse_expansion(method, folder, device, quantization)
    checkpoint = Checkpoint(folder)
    try:
        plain = unquantized(config) if method in ("nf4", "mxfp4") else config
        sketch = sketched(architecture, plain, cut, dtype)
        origins = conversion.origins(sketch, checkpoint)
        if method != "fp8":
            conversion.check(sketch, origins, folder, cut)
        packed = _packed(sketch, origins, quantization, experts_too=quantize_experts)
        hold = _Hold(origins, checkpoint, dtype, device)
        model = _place(architecture, plain, cut, hold, packed, method, sketch)
        hold.fill(model, packed)
        _finish(model, folder)
        return model
    finally:
        checkpoint.close()


def causal_class(config: PreTrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """The class of language model that transformers has for a configuration.

    Raises:
        WrongInputError: it has none.
    """
    try:
        return cast("type[PreTrainedModel]", AutoModelForCausalLM._model_mapping[type(config)])
    except KeyError:
        raise WrongInputError(
            f"{folder / 'config.json'}: model_type {config.model_type!r} is no causal language model that transformers knows",
            "choose a text-generation model",
        ) from None


def method_of(config: PreTrainedConfig) -> str | None:
    """How its checkpoint comes quantised: nf4, or as transformers names it; None: it is not."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    about = given if isinstance(given, dict) else given.to_dict()
    method = str(about.get("quant_method"))
    return "nf4" if method == "bitsandbytes" and about.get("load_in_4bit") else method


def sketched(
    architecture: type[PreTrainedModel], config: PreTrainedConfig, cut: Cut, dtype: torch.dtype
) -> PreTrainedModel:
    """The stage without memory, on the meta device: names, shapes and types."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = pruned_class(architecture, cut)(config)
    finally:
        torch.set_default_dtype(before)
    find_decoder(model)  # a whole model is not pruned, yet may be refused
    return cast("PreTrainedModel", model)


def quantizable(model: PreTrainedModel) -> tuple[set[str], set[str]]:
    """The names of the linear modules inside the layers and of the fused experts: what NF4 holds."""
    layers = find_decoder(model).layers
    inside = {id(module) for module in cast("nn.Module", layers).modules()}
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside and name.rpartition(".")[2] not in _ROUTERS
    }
    experts = {name for name, parameter in model.named_parameters() if nf4.is_fused(name, parameter)}
    return linears, experts


def _packed(
    sketch: PreTrainedModel, origins: dict[str, Origin], quantization: str | None, *, experts_too: bool
) -> tuple[set[str], set[str]]:
    """Linear modules and fused experts that are to be held in NF4: all of them if asked, and those that come so."""
    linears, experts = quantizable(sketch)
    asked = quantization == "nf4"
    come_so = {name for name, origin in origins.items() if origin.is_nf4 or origin.is_mxfp4}
    return (
        {name for name in linears if asked or f"{name}.weight" in come_so},
        {name for name in experts if (asked and experts_too) or name in come_so},
    )


class _Hold:
    """What is read, and as what."""

    def __init__(
        self, origins: dict[str, Origin], checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.origins, self.checkpoint, self.dtype, self.device = origins, checkpoint, dtype, device

    def lazies(self, sketch: PreTrainedModel, packed: tuple[set[str], set[str]], *, raw: bool) -> dict[str, Any]:
        """Everything that transformers' loader places, by name, to be read when it comes to it.

        With `raw` as the checkpoint has it: a quantizer of transformers' own takes it from there.
        """
        held, skip = sketch.state_dict(), {f"{name}.weight" for name in packed[0]} | packed[1]
        exact = "|".join(map(re.escape, getattr(sketch, "_keep_in_fp32_modules_strict", None) or ())) or r"(?!)"
        made: dict[str, Any] = {}
        for target, origin in self.origins.items():
            if target in skip:
                continue
            if origin.plain and origin.fused and not raw:
                made[target] = Lazy(self.checkpoint, origin, held[target].dtype, self.device)
                continue
            for entry in (*origin.entries, *origin.statistics.values()):
                as_is = raw or not origin.plain or entry.size <= _SMALL or re.search(exact, target)
                dtype = entry.dtype if as_is else held[target].dtype
                single = Origin(entry.name, ((entry,),))
                made[entry.name] = Lazy(
                    self.checkpoint, single, dtype, None if raw or not origin.plain else self.device
                )
        return made

    def fill(self, model: PreTrainedModel, packed: tuple[set[str], set[str]]) -> None:
        """Read, and quantise where it is not, what is held in NF4: one matrix at a time."""
        linears, experts = packed
        for name in sorted(linears, key=conversion.natural):
            origin, module = self.origins[f"{name}.weight"], model.get_submodule(name)
            if origin.is_nf4:
                statistics = {key: self.checkpoint.load(entry) for key, entry in origin.statistics.items()}
                nf4.put_packed(module, self.checkpoint.load(origin.entries[0]), statistics, self.device)
            else:
                pieces = conversion.pieces(self.checkpoint, origin, None, self.dtype, self.device)
                nf4.put_linear(module, pieces, self.dtype, self.device)
        for name in sorted(experts, key=conversion.natural):
            stack = model.get_submodule(name)
            assert isinstance(stack, nf4.ExpertStack)
            stack.allocate(self.device)
            fill_stack(stack, self.origins[name], self.checkpoint, self.dtype, self.device)


def fill_stack(
    stack: nf4.ExpertStack, origin: Origin, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> None:
    """Read all experts of a stack, quantising one after the other where they are not."""
    if origin.is_nf4:
        for key, tensor in stack.stored().items():
            checkpoint.read(origin.statistics[key] if key else origin.entries[0], tensor)
        return
    for index in range(stack.shape[0]):
        stack.put_pieces(index, conversion.pieces(checkpoint, origin, index, dtype, device))


def _place(
    architecture: type[PreTrainedModel],
    config: PreTrainedConfig,
    cut: Cut,
    hold: _Hold,
    packed: tuple[set[str], set[str]],
    method: str | None,
    sketch: PreTrainedModel,
) -> PreTrainedModel:
    """The model with everything in it but what is held in NF4."""
    linears, experts = packed

    def empty(model: PreTrainedModel) -> None:
        nf4.replace_linears(model, linears, hold.dtype)
        nf4.replace_experts(model, experts, hold.dtype)

    made = pruned_class(architecture, cut, empty if linears or experts else None)
    chosen = {"experts_implementation": "eager"} if experts else {}
    raw = method not in (None, "nf4", "mxfp4")
    folder = hold.checkpoint.folder
    try:
        with _one_by_one():
            model, info = made.from_pretrained(
                None,
                config=config,
                state_dict=hold.lazies(sketch, packed, raw=raw),
                dtype=hold.dtype,
                device_map={"": hold.device},
                output_loading_info=True,
                **chosen,
            )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise WrongInputError(f"{folder}: cannot be loaded: {reason}", "download the model again") from error
    if missing := sorted(info["missing_keys"]):
        raise WrongInputError(
            f"{folder}: {len(missing)} tensors of {cut} are not in the checkpoint, first {missing[0]}", conversion.AGAIN
        )
    if linears or experts:
        model.is_loaded_in_4bit = True  # peft looks for it
    return cast("PreTrainedModel", model)


def _finish(model: PreTrainedModel, folder: Path) -> None:
    """What `from_pretrained` does besides, where it is given a folder."""
    model.config.name_or_path = model.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    about = config.to_dict()
    about.pop("quantization_config", None)
    return type(config).from_dict(about)


def _refuse_expansion(method: str | None, folder: Path, device: torch.device, quantization: str | None) -> None:
    """Refuse what transformers would silently expand to 16 bits: what was planned for would not be what is held."""
    if method in (None, "nf4") or (method == "mxfp4" and quantization == "nf4"):
        return
    where, way = f"{folder}: comes in {method.upper()}", "take the 16-bit checkpoint with `quantization: nf4`"
    if method == "mxfp4":
        raise RefusedError(
            f"{where}, which would be expanded to 16 bits, four times its size",
            "set `quantization: nf4`, or make an NF4 copy: sparkctl quantize",
        )
    if method == "fp8":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            raise RefusedError(f"{where}, which would be expanded to 16 bits on {device.type}: it has no FP8", way)
        if quantization is not None:
            raise RefusedError(f"{where}, and NF4 is made of 16 bits only", way)
        return
    raise RefusedError(f"{where}, which cannot be loaded in stages", way)


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Let transformers read each tensor when it places it, instead of many ahead."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
