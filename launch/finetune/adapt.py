"""What of a stage is trained, a LoRA adapter or all of it, and how the parts of all stages become one result."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from cluster.errors import WrongInputError
from launch.recipe import FinetuneRecipe
from launch.shard.stage import Stage, find_decoder

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def linear_names(config: PreTrainedConfig) -> list[str]:
    """The names of the linear modules inside the layers, of the whole architecture: each rank must adapt by the same list."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    decoder: Any = find_decoder(model)
    names = {
        name.rpartition(".")[2] for name, module in decoder.layers.named_modules() if isinstance(module, nn.Linear)
    }
    # Where experts are fused, peft takes some names (gate_proj, up_proj, down_proj) for the experts' and leaves dense and shared
    # layers of that name alone: an adapter would be another than was asked for, so these names are not offered.
    probe = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(probe, model, None)
    return sorted(names & set(probe.target_modules or ()))


def add_lora(stage: Stage, recipe: FinetuneRecipe) -> Any:
    """Put a LoRA adapter on the stage, in place; returns peft's model, whose adapter starts the same however the model is cut.

    Raises:
        WrongInputError: `lora_target_modules` names something that no layer of the model has.
    """
    available = linear_names(stage.config)
    targets = list(recipe.lora_target_modules or available)
    if strangers := [name for name in targets if name.rpartition(".")[2] not in available]:
        # The head and the embedding too: only one rank has them, and vLLM does not load adapters of theirs.
        raise WrongInputError(
            f"lora_target_modules: no layer of the model has a linear module {strangers[0]!r}",
            f"its layers have: {', '.join(available)}",
        )
    lora = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=recipe.base_model,
    )
    try:
        adapted = get_peft_model(stage.model, lora)
    except ValueError:  # the only error left: this stage has none of them
        raise WrongInputError(
            f"lora_target_modules: none of {', '.join(targets)} is in {stage.cut}",
            "set `nodes: 1`, or adapt something that all layers have",
        ) from None
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            draw(parameter, f"{recipe.seed}/{name}")
    return adapted


@torch.no_grad()
def draw(parameter: torch.Tensor, key: str) -> None:
    """Start a matrix of an adapter, shape [r, columns], by its name."""
    # As peft does (Kaiming uniform with a = sqrt(5), so bound = 1 / sqrt(fan_in)), but drawn by name, so that one process
    # and two ranks start equal.
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(parameter.shape[1])
    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def save_adapter(adapted: Any, folder: Path) -> None:
    """Write one PEFT adapter folder on rank 0, the union of all stages' adapters: their layers are disjoint."""
    own = {name: tensor.cpu().contiguous() for name, tensor in get_peft_model_state_dict(adapted).items()}
    merged = dict(own)
    for part in _gather(own):
        merged |= part
    if _rank() == 0:
        folder.mkdir(exist_ok=True)
        adapted.peft_config["default"].save_pretrained(str(folder))
        safetensors.torch.save_file(merged, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def save_model(stage: Stage, tokenizer: Any, folder: Path) -> None:
    """Write the fully trained model: each rank its own safetensors file, rank 0 the index, the configuration and the tokenizer."""
    tied = set(getattr(stage.model, "all_tied_weights_keys", {}) or {})
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _own_tensors(stage).items() if name not in tied}
    folder.mkdir(exist_ok=True)
    if _world() == 1:
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        name = f"model-{_rank() + 1:05d}-of-{_world():05d}.safetensors"
        safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
        index = {key: (name, tensor.numel() * tensor.element_size()) for key, tensor in tensors.items()}
        listed = {key: torch.tensor([_rank(), size]) for key, (_, size) in index.items()}
        for part in _gather(listed):
            listed |= part
        if _rank() == 0:
            weight_map = {
                key: f"model-{int(entry[0]) + 1:05d}-of-{_world():05d}.safetensors"
                for key, entry in sorted(listed.items())
            }
            total = sum(int(entry[1]) for entry in listed.values())
            document = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=1))
    if _rank() == 0:
        stage.config.save_pretrained(folder)
        if stage.model.generation_config is not None:  # it may name more end tokens than the tokenizer does
            stage.model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _own_tensors(stage: Stage) -> dict[str, torch.Tensor]:
    tensors = dict(stage.model.state_dict())
    if (
        stage.cut.last and not stage.cut.first
    ):  # a tied embedding was loaded for the head alone; the first stage writes it
        tied = dict(getattr(stage.model, "all_tied_weights_keys", {}) or {})
        tensors = {name: tensor for name, tensor in tensors.items() if name not in tied.values()}
    return tensors


def _gather(own: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """On rank 0 the tensors of every other rank, sent as safetensors; on the others nothing. Nothing is pickled."""
    if _rank() > 0:
        data = torch.frombuffer(bytearray(safetensors.torch.save(own)), dtype=torch.uint8)
        dist.send(torch.tensor([data.numel()]), dst=0)
        dist.send(data, dst=0)
        return
    for source in range(1, _world()):
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, src=source)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, src=source)
        yield safetensors.torch.load(data.numpy().tobytes())


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
