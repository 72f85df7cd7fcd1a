"""Names, shapes and caches told from config.json alone are those of the model that transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.cache_utils import DynamicCache

from cluster.errors import WrongInputError
from launch import architecture, kv_cache, model_card, model_config, weights
from launch.model_config import ModelConfig
from launch.precision import Kind
from launch.tensors import Tensor
from tests import models

CONFIGS = Path(__file__).parent / "configs"
# Parameters in billions, without multi-token prediction.
TOTALS = {
    "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.554,
    "llama-3.1-405b": 405.853,
    "deepseek-r1-distill-qwen-32b": 32.764,
    "qwen3-235b-a22b": 235.094,
    "gpt-oss-120b": 116.829,
    "glm-4.5-355b-a32b": 352.798,
    "minimax-m2": 228.690,
    "deepseek-v3": 671.026,
    "mixtral-8x22b": 140.630,
}


def _read(name: str) -> ModelConfig:
    return model_config.parse((CONFIGS / f"{name}.json").read_text(), f"{name}/config.json")


def _on_meta(config: transformers.PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check(config: ModelConfig, model: nn.Module) -> None:
    """Compare the parameters of every layer, of embedding and head, and which of them are linear layers."""
    family = architecture.family_of(config)
    assert family is not None
    ours = dict(architecture.around(config, tied=model.config.tie_word_embeddings))
    for index in range(config.layers):
        layer = architecture.layer(config, family, index)
        theirs = {name: tuple(p.shape) for name, p in model.model.layers[index].named_parameters()}
        assert dict(layer) == theirs, index
        ours |= {f"model.layers.{index}.{name}": shape for name, shape in layer}
        linear = {
            f"{name}.weight"
            for name, module in model.model.layers[index].named_modules()
            if type(module) is nn.Linear  # not Llama 4's router, which is one by descent
        }
        made = weights.of_layer((name, Tensor(name, "BF16", shape, 2)) for name, shape in layer)
        assert {weight.name for weight in made if weight.kind is Kind.LINEAR} == linear
    assert ours == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", TOTALS)
def test_a_public_model_is_told_exactly(name: str) -> None:
    config = _read(name)
    card = model_card.of_config(config, name)
    assert card.parameters / 1e9 == pytest.approx(TOTALS[name], abs=0.0005)
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    raw.pop("quantization_config", None)
    model = _on_meta(transformers.AutoConfig.for_model(**raw))
    _check(config, model)
    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    for part, layer in zip(card.stack, model.model.layers, strict=True):
        assert part.parameters == sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize("name", [*models.FAMILIES, *models.ARCHITECTURES])
def test_a_model_of_every_family_is_told_exactly(name: str, tmp_path: Path) -> None:
    if name in models.FAMILIES:
        models.config(name).save_pretrained(tmp_path)
    else:
        models.make(tmp_path, name)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    config = model_config.parse((tmp_path / "config.json").read_text(), str(tmp_path))
    _check(config, _on_meta(theirs))


def test_every_family_is_tried() -> None:
    tried = {model_type for model_type, _ in models.FAMILIES.values()} | {"llama", "qwen3", "qwen3_moe"}
    assert tried == set(architecture.FAMILIES)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", *models.FAMILIES])
@pytest.mark.parametrize("length", [20, 70])
def test_a_cache_holds_what_is_said(name: str, length: int, tmp_path: Path) -> None:
    """After `length` tokens, one at a time at the end, as decoding does."""
    folder = models.make(tmp_path / "model", name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model_config.parse((folder / "config.json").read_text(), str(folder))
    caches = kv_cache.caches(config, architecture.family_of(config))
    cache = DynamicCache(config=model.config)
    ids = torch.arange(length)[None] % 200
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    assert len(cache.layers) == len(caches)
    for said, layer in zip(caches, cache.layers, strict=True):
        held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        held += [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)
        # transformers drops the token that just left the window; a slot of the window's size keeps its place.
        tokens = said.tokens(length) - (1 if said.window is not None and length >= said.window else 0)
        assert size == 4 * (said.per_token * tokens + said.conv + said.recurrent)


def test_raw_configurations_without_layer_types_are_filled_in_as_transformers_does() -> None:
    for name, keys in {
        "gemma2": {"sliding_window": 32},
        "gemma3_text": {"sliding_window": 32},
        "cohere2": {"sliding_window": 32},
        "gpt_oss": {"sliding_window": 32},
        "mistral": {"sliding_window": 32},
        "mixtral": {"sliding_window": None},
        "llama4_text": {"attention_chunk_size": 32},
        "qwen2": {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 4},
        "qwen3": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4},
        "qwen3_next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4},
    }.items():
        raw = {"num_hidden_layers": 13, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **keys}
        config = model_config.parse(json.dumps({"model_type": name, "head_dim": 16, **raw}), name)
        theirs = DynamicCache(config=transformers.AutoConfig.for_model(name, **raw)).layers
        ours = kv_cache.caches(config, architecture.family_of(config))
        kinds = [
            "linear" if hasattr(layer, "conv_states") else "window" if layer.is_sliding else "full" for layer in theirs
        ]
        assert [_kind(cache) for cache in ours] == kinds, name


def _kind(cache: kv_cache.LayerCache) -> str:
    return "linear" if cache.recurrent else "full" if cache.window is None else "window"


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("llama-3.1-8b", 32 * 2 * 8 * 128 * 2),  # GQA
        ("deepseek-v3", 61 * (512 + 64) * 2),  # MLA
        ("gpt-oss-120b", 18 * 2 * 8 * 64 * 2),  # half of its layers: the others have seen their window
    ],
)
def test_a_token_more_takes_what_the_papers_say(name: str, bytes_per_token: int) -> None:
    stack = model_card.of_config(_read(name), name).stack
    sizes = [sum(part.cache.size(length, 2) for part in stack if part.cache) for length in (1000, 1001)]
    assert sizes[1] - sizes[0] == bytes_per_token


def test_an_unknown_family_is_told_to_bring_its_weights() -> None:
    config = model_config.parse('{"model_type": "mamba", "num_hidden_layers": 2}', "m/config.json")
    with pytest.raises(WrongInputError, match="'mamba': its sizes cannot be told from") as wrong:
        model_card.of_config(config, "m")
    assert "safetensors" in wrong.value.fix
