"""What a plan says that a rank holds is what it holds; and what that comes to for models of every size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.errors import WrongInputError
from launch import model_card, plan, workload
from launch.box import GIB
from launch.capacity import Demand, Memory, rule_of_thumb
from launch.finetune import adapt
from launch.plan import Plan
from launch.precision import Precision
from launch.recipe import FinetuneRecipe, InferenceRecipe
from launch.shard.stage import Stage
from launch.split import Cut, whole
from launch.workload import Serving, Training
from tests import models
from tests.launch.plans import SPARKS, cpus, public, serve, tune

CPU = torch.device("cpu")
# GQA and tied, a mixture, windows and biases, latent attention, linear attention, all layers with a window.
SMALL = ["llama-tied", "qwen3-moe", "gpt-oss", "deepseek-v3", "qwen3-next", "mistral-window"]
# Where peft takes the names of feed-forward modules for those of the experts, attention alone is adapted.
TARGETS = {
    "deepseek-v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "self_attn.o_proj"],
    "qwen3-next": ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"],
}


def _size(tensors: Iterable[torch.Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _plan(recipe: FinetuneRecipe | InferenceRecipe, folder: Path) -> tuple[Plan, list[Stage]]:
    """A plan over two ranks on CPUs, and the stages that it lays out."""
    made = plan.plan(recipe, model_card.read(folder), cpus())
    return made, [Stage.load(folder, rank.cut, dtype=torch.float32, device=CPU) for rank in made.ranks]


@pytest.mark.parametrize("architecture", SMALL)
def test_weights_and_lora_are_those_that_the_ranks_hold(architecture: str, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", architecture)
    targets = {"lora_target_modules": TARGETS[architecture]} if architecture in TARGETS else {}
    recipe = tune(base_model=str(folder), adapter="lora", lora_r=8, sequence_len=64, **targets)
    made, stages = _plan(recipe, folder)
    for rank, stage in zip(made.ranks, stages, strict=True):
        weights = _size([*stage.model.parameters(), *stage.model.buffers()])
        lora = _size(p for p in adapt.add_lora(stage, recipe).parameters() if p.requires_grad)
        assert rank.memory.weights + rank.memory.lora == pytest.approx(weights + lora, rel=0.03)
        assert rank.memory.lora == rank.memory.gradients == rank.memory.optimizer // 2 == lora


@pytest.mark.parametrize("architecture", SMALL)
def test_weights_and_caches_are_those_that_the_ranks_hold(architecture: str, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", architecture)
    rows, length = 3, 96
    recipe = serve(base_model=str(folder), quantization=None, max_model_len=length, max_num_seqs=rows)
    made, stages = _plan(recipe, folder)
    passed: torch.Tensor = torch.arange(rows * length).reshape(rows, length) % 256
    positions = torch.arange(length).expand(rows, length)
    for rank, stage in zip(made.ranks, stages, strict=True):
        cache = stage.new_cache()
        with torch.no_grad():
            passed = stage.forward(passed, attention_mask=None, position_ids=positions, cache=cache)
        weights = _size([*stage.model.parameters(), *stage.model.buffers()])
        kept = _size(
            tensor
            for layer in cache.layers
            for held in (vars(layer).get("keys"), vars(layer).get("values"), *_states(layer))
            if isinstance(tensor := held, torch.Tensor)
        )
        assert kept > 0
        assert rank.memory.weights + rank.memory.kv_cache == pytest.approx(weights + kept, rel=0.03)


def _states(layer: Any) -> list[Any]:
    return [*vars(layer).get("conv_states", {}).values(), *vars(layer).get("recurrent_states", {}).values()]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3-moe"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_those_that_autograd_keeps(architecture: str, adapter: str, bf16: bool, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    folder = models.make(tmp_path / "model", architecture, **wide, head_dim=32, vocab_size=264)
    recipe = tune(base_model=str(folder), adapter=adapter, bf16=bf16, gradient_checkpointing=False, lora_r=8)
    recipe = recipe.model_copy(update={"sequence_len": 256})
    card = model_card.read(folder)
    precision = workload.precision(recipe, card, cuda=False)
    work = workload.of_recipe(recipe)
    assert isinstance(work, Training)
    dtype = torch.float32 if precision.element == 4 else torch.bfloat16
    stage = Stage.load(folder, whole(4), dtype=dtype, device=CPU)
    if adapter == "lora":
        adapt.add_lora(stage, recipe)
    stage.model.train()
    kept = _kept(stage, torch.arange(256)[None] % 200, autocast=precision.compute == 2)
    demand = Demand(card, work, precision, cuda=False)
    with_them = demand.of(whole(4), in_flight=2, ranks=1).activations
    without = demand.of(whole(4), in_flight=1, ranks=1).activations
    assert with_them - without == pytest.approx(kept, rel=0.1)


def _kept(stage: Stage, ids: torch.Tensor, *, autocast: bool) -> int:
    """Bytes of all storages that a forward pass keeps for its backward pass, but for the weights themselves."""
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.model.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        decoder: nn.Module = stage.decoder
        decoder(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False)
    return sum(storages.values())


def test_405b_in_nf4_is_100_gib_a_node() -> None:
    made = plan.plan(serve(), public("llama-3.1-405b"), SPARKS)
    assert [round(rank.memory.weights / GIB, 1) for rank in made.ranks] == [100.4, 100.4]
    assert [str(rank.cut) for rank in made.ranks] == ["embedding + layers 0-62", "layers 63-125 + head"]


@pytest.mark.parametrize(
    ("name", "quantization", "fits"),
    [
        ("llama-3.1-8b", None, True),
        ("llama-3.1-70b", None, True),
        ("llama-3.1-405b", None, False),
        ("llama-3.1-405b", "nf4", True),
        ("deepseek-r1-distill-qwen-32b", None, True),
        ("qwen3-235b-a22b", None, False),
        ("qwen3-235b-a22b", "nf4", True),
        ("gpt-oss-120b", None, False),  # expanded from MXFP4 to 16 bits
        ("gpt-oss-120b", "nf4", True),
        ("glm-4.5-355b-a32b", "nf4", True),
        ("minimax-m2", None, False),  # 107 GiB of FP8 a node, which leave no room for the rest
        ("minimax-m2", "nf4", True),
        ("deepseek-v3", None, False),
        ("deepseek-v3", "nf4", False),
        ("mixtral-8x22b", "nf4", True),
    ],
)
def test_which_public_models_two_sparks_hold(name: str, quantization: str | None, fits: bool) -> None:
    assert plan.plan(serve(quantization=quantization), public(name), SPARKS).fits == fits


@pytest.mark.parametrize(
    ("name", "changes", "fits"),
    [
        ("llama-3.1-405b", {"lora_r": 4}, True),
        ("llama-3.1-405b", {"lora_r": 4, "sequence_len": 8192}, False),
        ("qwen3-235b-a22b", {}, True),
        ("deepseek-r1-distill-qwen-32b", {"sequence_len": 2048, "micro_batch_size": 4}, True),
        ("llama-3.1-70b", {"sequence_len": 4096}, True),
        ("llama-3.1-70b", {"adapter": "full"}, False),
        ("llama-3.1-8b", {"adapter": "full"}, True),
        ("llama-3.1-8b", {"adapter": "full", "strategy": "zero3"}, True),
        ("llama-3.1-8b", {"adapter": "full", "strategy": "ddp"}, False),
        ("llama-3.1-8b", {"adapter": "lora", "strategy": "ddp"}, True),
        ("deepseek-v3", {}, False),
    ],
)
def test_which_public_models_two_sparks_tune(name: str, changes: dict[str, Any], fits: bool) -> None:
    assert plan.plan(tune(**changes), public(name), SPARKS).fits == fits


def test_the_seeds_table_of_what_fits() -> None:
    """FP4 with 20% kept back; it was told as 51, 153, 200 and 405 billion."""
    table = {32: 51, 96: 153, 128: 204, 256: 409}
    assert {gb: rule_of_thumb(gb * 10**9) // 10**9 for gb in table} == table


# ---- how the parts grow

EVERYTHING = whole(32)


def _memory(cut: Cut = EVERYTHING, *, in_flight: int = 1, ranks: int = 2, cuda: bool = True, **changes: Any) -> Memory:
    """A stage of an 8B model in training."""
    recipe, card = tune(**changes), public("llama-3.1-8b")
    work, precision = workload.of_recipe(recipe), workload.precision(recipe, card, cuda=cuda)
    return Demand(card, work, precision, cuda=cuda).of(cut, in_flight=in_flight, ranks=ranks)


def test_checkpointing_keeps_one_tensor_a_layer_instead_of_all() -> None:
    kept, not_kept = _memory(gradient_checkpointing=False), _memory()
    assert kept.activations > 3 * not_kept.activations
    hidden = 512 * 4096 * 2
    more = _memory(in_flight=2).activations - not_kept.activations
    assert more == 32 * hidden  # of another micro-batch


def test_stages_add_up_to_the_model() -> None:
    first, last, everything = _memory(Cut(0, 20, 32)), _memory(Cut(20, 32, 32)), _memory()
    for field in ("weights", "lora", "gradients", "optimizer"):
        assert getattr(first, field) + getattr(last, field) == getattr(everything, field)


def test_a_token_vocabulary_weighs_on_the_last_stage_only() -> None:
    first, last = _memory(Cut(0, 16, 32)), _memory(Cut(16, 32, 32))
    assert last.activations - first.activations == pytest.approx(512 * 128256 * 14, rel=0.01)


def test_states_of_the_optimizers() -> None:
    trained = _memory(adapter="lora").lora // 4
    per_number = {
        name: _memory(adapter="lora", optimizer=name).optimizer / trained for name in ("adamw_torch", "adamw_8bit")
    }
    assert per_number == {"adamw_torch": 8.0, "adamw_8bit": pytest.approx(2.03, abs=0.01)}
    full = _memory(adapter="full", optimizer="adafactor")
    assert full.optimizer < 0.002 * _memory(adapter="full").optimizer
    assert 0 < _memory(adapter="lora", optimizer="adafactor").optimizer < _memory(adapter="lora").optimizer


def test_trained_weights_are_32_bit_and_have_16_bit_copies_while_they_compute() -> None:
    full, sixteen = _memory(adapter="full"), _memory(adapter="lora")
    assert full.weights == full.gradients == full.optimizer // 2 == 2 * sixteen.weights
    assert full.activations >= full.weights // 2
    assert _memory(adapter="full", bf16=False, cuda=False).activations < full.weights // 4


def test_experts_stay_16_bit_when_asked_to() -> None:
    card = public("qwen3-235b-a22b")
    with_them, without = (
        Demand(card, workload.of_recipe(recipe), workload.precision(recipe, card, cuda=True), cuda=True)
        .of(whole(94), in_flight=1, ranks=1)
        .weights
        for recipe in (tune(), tune(quantize_moe_experts=False))
    )
    assert without > 3.5 * with_them


def test_fsdp_and_zero_share_out_state_and_ddp_does_not() -> None:
    card = public("llama-3.1-8b")
    shared, zero, everywhere = (
        plan.plan(tune(adapter="full", strategy=name), card, SPARKS).ranks[0].memory
        for name in ("fsdp2", "zero3", "ddp")
    )
    assert shared == zero
    assert everywhere.optimizer == 2 * shared.optimizer
    assert everywhere.gradients == 2 * shared.gradients
    largest = 4 * card.stack[0].parameters
    assert shared.weights == everywhere.weights // 2 + 2 * largest
    # A quantised model stands on every rank whole before it can be shared out.
    assert plan.plan(tune(strategy="fsdp2"), card, SPARKS).ranks[0].memory.weights > 4 * GIB


def test_caches_grow_with_sequences_and_with_context_up_to_the_window() -> None:
    card = public("gpt-oss-120b")

    def cache(sequences: int, context: int) -> int:
        demand = Demand(card, Serving(sequences, context, 2048), Precision(None, 2, 2), cuda=True)
        return demand.of(whole(36), in_flight=1, ranks=1).kv_cache

    token = 2 * 8 * 64 * 2
    assert cache(1, 128) == 36 * 128 * token
    assert cache(1, 1128) - cache(1, 128) == 18 * 1000 * token
    assert cache(7, 1128) == 7 * cache(1, 1128)


def test_an_adapter_that_is_served_counts() -> None:
    card = public("llama-3.1-8b")
    plain, adapted = (
        Demand(card, Serving(1, 512, 2048, adapter), Precision(None, 2, 2), cuda=True).of(
            Cut(0, 8, 32), in_flight=1, ranks=2
        )
        for adapter in ((), (1000,) * 32)
    )
    assert adapted.total - plain.total == adapted.lora == 4 * 8 * 1000


def test_a_gpu_costs_a_context_and_a_second_rank_its_buffers() -> None:
    alone, pair = _memory(ranks=1), _memory(ranks=2)
    assert pair.runtime - alone.runtime > 0.4 * GIB
    assert alone.runtime - _memory(ranks=1, cuda=False).runtime > GIB


def test_all_of_it_is_in_the_total() -> None:
    made = Memory(*(10**index for index in range(len(fields(Memory)))))
    assert made.total == 1111111


def test_a_packed_weight_of_unknown_shape_cannot_be_adapted() -> None:
    card = public("llama-3.1-8b")
    packed = replace(card.stack[0], weights=tuple(replace(w, rows=0, packed=True) for w in card.stack[0].weights))
    unknown = replace(card, stack=(packed,) * 32, quantized="nf4")
    recipe = tune()
    with pytest.raises(WrongInputError, match="holds it packed"):
        Demand(unknown, workload.of_recipe(recipe), workload.precision(recipe, unknown, cuda=True), cuda=True)
