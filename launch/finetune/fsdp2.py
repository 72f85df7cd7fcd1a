"""The fsdp2 strategy: every matrix is cut over the ranks, and gathered layer by layer while it is used (torch's fully_shard)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from cluster.errors import FailedError
from launch.finetune import adapt, packing
from launch.finetune.replicas import Replicas
from launch.recipe import FinetuneRecipe
from launch.shard.stage import Stage, find_decoder, load_config
from launch.split import Cut, whole


class Fsdp2(Replicas):
    """This rank's slices. They are loaded layer by layer: no rank ever holds the whole model."""

    def __init__(
        self,
        recipe: FinetuneRecipe,
        *,
        layers: int,
        dtype: torch.dtype,
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> None:
        folder = Path(recipe.base_model)
        with torch.device("meta"):
            plain: Any = AutoModelForCausalLM.from_config(load_config(folder), dtype=dtype, trust_remote_code=False)
        self._plain = plain
        self._adapted: Any = None if recipe.adapter == "full" else adapt.add_lora(Stage(plain, whole(layers)), recipe)
        model = plain if self._adapted is None else self._adapted
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in find_decoder(plain).layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device=device)
        plain.tie_weights()
        _fill(plain, folder, layers, dtype, device)
        if self._adapted is not None:
            _fill_adapter(model, recipe.seed)
        unsharded = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if unsharded:
            raise FailedError(
                f"fsdp2 left {unsharded[0]} whole on every rank", "report this, or use `strategy: pipeline`"
            )
        model.train()
        if recipe.sample_packing:
            # Through the outermost module: a layer that runs before it would take itself for the whole.
            packing.check(
                Stage(plain, whole(layers)),
                recipe.name,
                lambda row, **given: model(input_ids=row, use_cache=False, **given).logits,
            )
        if recipe.gradient_checkpointing:
            plain.activation_checkpointing_enable({"use_reentrant": False})
        super().__init__(model, model, recipe, device, autocast)

    def save(self, *, adapter: Path, model: Path, tokenizer: Any) -> Path:
        """All ranks gather, rank 0 writes."""
        where = model if self._adapted is None else adapter
        first = dist.get_rank() == 0
        full = {}
        for name, tensor in self._trained.named.items():
            gathered = tensor.full_tensor().detach()  # type: ignore[attr-defined]
            if first:
                full[name] = gathered.cpu().contiguous()
        if first:
            where.mkdir(exist_ok=True)
            if self._adapted is None:
                self._plain.save_pretrained(str(where), state_dict=full)
                tokenizer.save_pretrained(where)
            else:
                tensors = get_peft_model_state_dict(self._adapted, state_dict=full)
                self._adapted.peft_config["default"].save_pretrained(str(where))
                safetensors.torch.save_file(tensors, where / adapt.ADAPTER_WEIGHTS, metadata={"format": "pt"})
        dist.barrier()
        return where

    def _synchronise(self, now: bool) -> None:
        self._model.set_requires_gradient_sync(now)


@torch.no_grad()
def _fill(plain: nn.Module, folder: Path, layers: int, dtype: torch.dtype, device: torch.device) -> None:
    """Read one layer after the other, each rank keeping its slices of it."""
    wanted = {_own_name(name): tensor for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]}
    for index in range(layers):
        part = Stage.load(folder, Cut(index, index + 1, layers), dtype=dtype, device=device)
        for name, tensor in [*part.model.named_parameters(), *part.model.named_buffers()]:
            if name in wanted:
                _take(wanted[name], tensor)


@torch.no_grad()
def _fill_adapter(adapted: nn.Module, seed: int) -> None:
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            start = torch.zeros(parameter.shape)
            if "lora_A" in name:
                adapt.draw(start, f"{seed}/{name}")
            _take(parameter, start)


def _take(target: torch.Tensor, full: torch.Tensor) -> None:
    if isinstance(target, DTensor):
        own = distribute_tensor(full.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(own.to_local())
    else:
        target.copy_(full)


def _own_name(name: str) -> str:
    """A parameter's name before peft put its adapter around it."""
    return name.replace(".base_layer.", ".")
