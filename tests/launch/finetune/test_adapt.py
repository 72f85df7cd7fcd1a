"""What is trained starts the same however the model is cut, and the parts of all stages make one result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from cluster.errors import WrongInputError
from launch import model_card
from launch.finetune import adapt
from launch.recipe import FinetuneRecipe, parse_dump
from launch.shard.stage import Stage, load_config
from launch.split import Cut, balance, whole
from tests import models
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]


def _recipe(folder: Path, **changes: Any) -> FinetuneRecipe:
    data = {"kind": "finetune", "name": "tune", "base_model": str(folder), "lora_r": 4, "lora_alpha": 8, "seed": 3}
    made = parse_dump({**data, "datasets": [{"path": "unused.jsonl", "type": "qa"}], **changes})
    assert isinstance(made, FinetuneRecipe)
    return made


def _stage(folder: Path, cut: Cut) -> Stage:
    return Stage.load(folder, cut, dtype=torch.float32, device=CPU)


def _adapter(folder: Path, cut: Cut, **changes: Any) -> dict[str, torch.Tensor]:
    """What is trained after an adapter was put on a stage."""
    adapted = adapt.add_lora(_stage(folder, cut), _recipe(folder, **changes))
    return {name: parameter.detach() for name, parameter in adapted.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("architecture", "feed_forward"),
    [("llama", ["down_proj", "gate_proj", "up_proj"]), ("qwen3-moe", [])],  # experts are no linear modules
)
def test_every_linear_module_of_the_layers_is_named(architecture: str, feed_forward: list[str], tmp_path: Path) -> None:
    config = load_config(models.make(tmp_path / "model", architecture))
    assert adapt.linear_names(config) == sorted([*ATTENTION, *feed_forward])


@pytest.mark.parametrize("architecture", ["deepseek-v3", "qwen3-next", "glm4-moe"])
def test_names_that_peft_takes_for_fused_experts_are_not_adapted_in_their_place(
    architecture: str, tmp_path: Path
) -> None:
    folder = models.make(tmp_path / "model", architecture)
    names = adapt.linear_names(load_config(folder))
    assert "o_proj" in names
    assert not {"gate_proj", "up_proj", "down_proj"} & set(names)
    adapted = _adapter(folder, whole(4))
    assert adapted
    assert not [name for name in adapted if ".experts." in name]
    with pytest.raises(WrongInputError, match="no layer of the model has a linear module 'gate_proj'"):
        _adapter(folder, whole(4), lora_target_modules=["gate_proj", "up_proj"])


def test_an_adapter_starts_the_same_however_the_model_is_cut(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    everything = _adapter(folder, whole(4))
    assert len(everything) == 4 * 7 * 2
    parts = [_adapter(folder, Cut(0, 1, 4)), _adapter(folder, Cut(1, 4, 4))]
    assert sum(len(part) for part in parts) == len(everything)
    for name, parameter in {**parts[0], **parts[1]}.items():
        assert torch.equal(parameter, everything[name]), name


def test_an_adapter_starts_as_no_change_and_as_peft_would_draw_it(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    start = _adapter(folder, whole(4))
    for name, parameter in start.items():
        if "lora_B" in name:
            assert not parameter.any(), name
            continue
        bound = 1 / math.sqrt(parameter.shape[1])  # Kaiming uniform with a = sqrt(5)
        assert float(parameter.abs().max()) <= bound
        assert float(parameter.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
    drawn = [parameter for name, parameter in start.items() if "q_proj.lora_A" in name]
    assert not torch.equal(drawn[0], drawn[1]), "each layer draws its own"
    again, other = _adapter(folder, whole(4)), _adapter(folder, whole(4), seed=4)
    name = next(name for name in start if "lora_A" in name)
    assert torch.equal(start[name], again[name])
    assert not torch.equal(start[name], other[name])


def test_only_the_modules_asked_for_are_adapted(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    names = _adapter(folder, whole(4), lora_target_modules=["v_proj", "q_proj"])
    assert len(names) == 4 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in names)
    with pytest.raises(WrongInputError) as wrong:
        _adapter(folder, whole(4), lora_target_modules=["query"])
    assert wrong.value.message.startswith("lora_target_modules: ")
    assert "query" in wrong.value.message
    assert "q_proj" in wrong.value.fix


def test_two_ranks_write_one_adapter_with_every_layer(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    run_ranks(_save_adapter, folder, tmp_path / "adapter")
    expected = _adapter(folder, whole(4))
    saved = load_file(tmp_path / "adapter" / adapt.ADAPTER_WEIGHTS)
    assert {name.replace(".weight", ".default.weight") for name in saved} == set(expected)
    for name, tensor in saved.items():
        assert torch.equal(tensor, expected[name.replace(".weight", ".default.weight")]), name
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(folder))
    assert sorted(config["target_modules"]) == adapt.linear_names(load_config(folder))
    assert sorted(path.name for path in (tmp_path / "adapter").glob("*.safetensors")) == [adapt.ADAPTER_WEIGHTS]


def _cuts(folder: Path, world: int) -> tuple[Cut, ...]:
    card = model_card.read(folder)
    return balance(card.layer_bytes, stages=world, embedding_cost=card.embedding_bytes, head_cost=card.head_cost)


def _save_adapter(rank: int, folder: Path, out: Path) -> None:
    adapt.save_adapter(adapt.add_lora(_stage(folder, _cuts(folder, 2)[rank]), _recipe(folder)), out)


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_two_ranks_write_one_model_with_every_tensor_once(architecture: str, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", architecture)
    run_ranks(_save_model, 2, folder, tmp_path / "out")
    original = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / "out" / name) for name in set(index["weight_map"].values())}
    assert sorted(files) == [f"model-0000{rank}-of-00002.safetensors" for rank in (1, 2)]
    assert {key: name for name, part in files.items() for key in part} == index["weight_map"]
    assert sum(len(part) for part in files.values()) == len(index["weight_map"])
    size = sum(tensor.numel() * tensor.element_size() for part in files.values() for tensor in part.values())
    assert index["metadata"]["total_size"] == size
    before, after = model_card.read(folder), model_card.read(tmp_path / "out")
    assert (after.total_bytes, after.tied, after.parameters) == (before.total_bytes, before.tied, before.parameters)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_one_rank_writes_one_file(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", "llama-tied")
    _save_model(0, 1, folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def _save_model(rank: int, world: int, folder: Path, out: Path) -> None:
    adapt.save_model(_stage(folder, _cuts(folder, world)[rank]), models.tokenizer(), out)
