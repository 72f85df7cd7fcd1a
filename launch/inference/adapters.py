"""Several LoRA adapters on one stage: each row of a step is computed with its own, or with none.

An adapter adds scale x B A x to what a linear layer makes of x (Hu et al. 2021, arXiv:2106.09685). The A and B of all adapters
stand in one tensor each; number 0 is nothing but zeros, so the rows of a step differ in an index alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.errors import WrongInputError
from launch.shard.stage import Passthrough, Stage

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Adapter:
    """One adapter as its folder has it: A [rank, in] and B [out, rank] by the module's name, and the scale."""

    folder: Path
    tensors: Mapping[str, torch.Tensor]
    scale: float

    def pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        a = self.tensors.get(f"{_PREFIX}{module}.lora_A.weight")
        b = self.tensors.get(f"{_PREFIX}{module}.lora_B.weight")
        return None if a is None or b is None else (a, b)


@dataclass
class _Choice:
    """The adapter of each row of the step that runs; None where no row has one."""

    rows: torch.Tensor | None = None


class _Adapted(nn.Module):
    """A linear layer with every adapter's A and B for it."""

    def __init__(
        self, base: nn.Module, pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None], choice: _Choice
    ) -> None:
        super().__init__()
        self.base, self._choice = base, choice
        known = [pair for pair in pairs if pair is not None]
        rank = max(a.shape[0] for a, _ in known)
        a0, b0 = known[0]
        down = a0.new_zeros(len(pairs) + 1, rank, a0.shape[1])
        up = b0.new_zeros(len(pairs) + 1, b0.shape[0], rank)
        for number, pair in enumerate(pairs, start=1):
            if pair is not None:
                down[number, : pair[0].shape[0]], up[number, :, : pair[1].shape[1]] = pair
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    def __getattr__(self, name: str) -> Any:
        """What others ask of a linear layer: its weight, its features."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer's own, [..., in] to [..., out]."""
        output: torch.Tensor = self.base(x)
        rows = self._choice.rows
        if rows is None:
            return output
        grouped = x.reshape(len(rows), -1, x.shape[-1])  # some layers see all rows' tokens as one list
        down, up = self.down[rows], self.up[rows]
        added = torch.bmm(torch.bmm(grouped.to(down.dtype), down.transpose(1, 2)), up.transpose(1, 2))
        return output + added.reshape(output.shape).to(output.dtype)


class Adapters:
    """All adapters of one stage, put on in place. Their numbers are their places in the mapping, from 1.

    Raises:
        WrongInputError: a folder is no plain LoRA adapter, or was made for another model.
    """

    def __init__(self, stage: Stage, folders: Mapping[str, Path]) -> None:
        self.numbers = {name: number for number, name in enumerate(folders, start=1)}
        self._choice = _Choice()
        self._device = stage.device
        adapters = [_read(folder) for folder in folders.values()]
        wanted = {key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for one in adapters for key in one.tensors}
        modules = dict(stage.model.named_modules())
        for name in sorted(wanted):
            if name not in modules:
                if not _is_elsewhere(name, stage):
                    raise WrongInputError(
                        f"{adapters[0].folder}: has a tensor for {name}, which the model lacks",
                        "it was made for another model",
                    )
                continue
            self._put_on(name, modules, adapters, stage)

    def _put_on(self, name: str, modules: Mapping[str, nn.Module], adapters: Sequence[_Adapter], stage: Stage) -> None:
        base = modules[name]
        pairs = []
        for adapter in adapters:
            pair = adapter.pair(name)
            if pair is not None:
                a, b = (tensor.to(stage.device, stage.dtype) for tensor in pair)
                shape = (getattr(base, "out_features", None), getattr(base, "in_features", None))
                if (b.shape[0], a.shape[1]) != shape:
                    raise WrongInputError(
                        f"{adapter.folder}: {name} is {b.shape[0]} x {a.shape[1]} there, but {shape[0]} x {shape[1]} in the model",
                        "it was made for another model",
                    )
                pair = (a, b * adapter.scale)
            pairs.append(pair)
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, _Adapted(base, pairs, self._choice))

    def choose(self, rows: Sequence[int]) -> None:
        """The adapter's number of each row of the next step; 0 is none."""
        self._choice.rows = torch.tensor(list(rows), device=self._device) if any(rows) else None


def _is_elsewhere(name: str, stage: Stage) -> bool:
    """Whether a module belongs to another stage."""
    modules = dict(stage.model.named_modules())
    parts = name.split(".")
    parents = (modules.get(".".join(parts[:length])) for length in range(len(parts)))
    return any(isinstance(parent, Passthrough) for parent in parents)


def _read(folder: Path) -> _Adapter:
    from peft import LoraConfig
    from safetensors.torch import load_file

    try:
        config: Any = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise WrongInputError(
            f"{folder}: is no PEFT adapter folder ({first})", "give `adapter_path` the adapter/ folder of a job"
        ) from None
    beyond = [
        key for key in ("use_dora", "rank_pattern", "alpha_pattern", "target_parameters") if getattr(config, key, None)
    ]
    strange = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if beyond or strange:
        raise WrongInputError(
            f"{folder}: has {beyond[0] if beyond else strange[0]}, which is more than LoRA on linear layers",
            "merge it into the model, and serve that",
        )
    rank = config.r**0.5 if config.use_rslora else config.r
    return _Adapter(folder, tensors, config.lora_alpha / rank)
