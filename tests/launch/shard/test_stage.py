"""A stage is its own part of the model and nothing else: in memory, in its cache, and in what it computes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DummyLayer

from cluster.errors import WrongInputError
from launch.shard.stage import Passthrough, Stage, check_seams, find_decoder, load_config
from launch.split import Cut, whole
from tests import models

CPU = torch.device("cpu")
CUTS = (Cut(0, 1, 4), Cut(1, 3, 4), Cut(3, 4, 4))


def _load(folder: Path, cut: Cut) -> Stage:
    return Stage.load(folder, cut, dtype=torch.float32, device=CPU)


def _expected_names(names: set[str], cut: Cut, *, tied: bool) -> set[str]:
    layers = {
        name
        for name in names
        if (found := re.search(r"layers\.(\d+)\.", name)) and int(found[1]) in range(*_range(cut))
    }
    first = {"model.embed_tokens.weight"}
    last = {"model.norm.weight"} | (first if tied else {"lm_head.weight"})
    return layers | (first if cut.first else set()) | (last if cut.last else set())


def _range(cut: Cut) -> tuple[int, int]:
    return cut.start, cut.end


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_a_stage_holds_its_own_tensors_and_no_other(architecture: str, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", architecture)
    everything = {name: parameter.detach() for name, parameter in _load(folder, whole(4)).model.named_parameters()}
    for cut in CUTS:
        own = dict(_load(folder, cut).model.named_parameters())
        assert set(own) == _expected_names(set(everything), cut, tied="tied" in architecture)
        assert {parameter.device.type for parameter in own.values()} == {"cpu"}
        for name, parameter in own.items():
            assert torch.equal(parameter, everything[name]), name


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_stages_in_a_row_give_the_logits_of_the_whole(architecture: str, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", architecture)
    ids = torch.tensor([list(b"two sparks, one cable"), list(b"one cable, two sparks")])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hidden = ids
    with torch.no_grad():
        for cut in CUTS:
            stage = _load(folder, cut)
            hidden = stage.forward(hidden, attention_mask=None, position_ids=positions)
            assert hidden.shape == (*ids.shape, 264 if cut.last else stage.hidden_size)
        torch.testing.assert_close(hidden, model(ids).logits, rtol=0, atol=1e-5)


def test_only_the_last_positions_asked_for_get_logits(tmp_path: Path) -> None:
    stage = _load(models.make(tmp_path / "model"), CUTS[-1])
    hidden = torch.randn(2, 5, stage.hidden_size)
    positions = torch.arange(5).expand(2, 5)
    with torch.no_grad():
        every = stage.forward(hidden, attention_mask=None, position_ids=positions)
        kept = stage.forward(hidden, attention_mask=None, position_ids=positions, keep=1)
    assert (every.shape, kept.shape) == ((2, 5, 264), (2, 1, 264))
    torch.testing.assert_close(kept[:, 0], every[:, -1])


def test_layers_of_other_ranks_have_no_place_in_the_cache(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    for cut in CUTS:
        stage = _load(folder, cut)
        cache = stage.new_cache()
        assert [isinstance(layer, DummyLayer) for layer in cache.layers] == [
            not cut.start <= index < cut.end for index in range(4)
        ]
        inputs = torch.zeros(2, 3, dtype=torch.int64) if cut.first else torch.zeros(2, 3, stage.hidden_size)
        with torch.no_grad():
            stage.forward(
                inputs, attention_mask=torch.ones(2, 3), position_ids=torch.arange(3).expand(2, 3), cache=cache
            )
        assert cache.get_seq_length() == 3
        own = [layer for layer in cache.layers if not isinstance(layer, DummyLayer)]
        assert [tuple(layer.keys.shape) for layer in own] == [(2, 2, 3, 16)] * (cut.end - cut.start)


def test_a_tensor_that_is_missing_is_named_by_the_stage_that_needs_it(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WrongInputError) as wrong:
        _load(folder, CUTS[1])
    assert "1 tensors of layers 1-2 are not in the checkpoint" in wrong.value.message
    assert "first model.layers.2.self_attn.k_proj.weight" in wrong.value.message
    _load(folder, CUTS[0])
    _load(folder, CUTS[2])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            "GPT2LMHeadModel",
            {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0},
        ),
        (
            "OPTForCausalLM",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "ffn_dim": 32},
        ),
    ],
)
@pytest.mark.parametrize("cut", [Cut(0, 1, 2), whole(2)], ids=["split", "whole"])
def test_another_layout_is_refused_by_its_name(name: str, settings: dict[str, Any], cut: Cut, tmp_path: Path) -> None:
    architecture = getattr(transformers, name)
    architecture(architecture.config_class(**settings)).save_pretrained(tmp_path)
    with pytest.raises(WrongInputError) as wrong:
        _load(tmp_path, cut)
    assert wrong.value.message.startswith(f"{name}: not a plain stack of layers")
    assert "one list of layers" in wrong.value.fix


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AfmoeForCausalLM", {"mup_enabled": True, "num_local_experts": 4, "moe_intermediate_size": 32}),  # scales it
        ("NanoChatForCausalLM", {}),  # normalises it
    ],
)
def test_a_model_that_treats_embeddings_on_the_way_to_its_layers_is_refused_by_its_name(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    architecture = getattr(transformers, name)
    config = architecture.config_class(**{**models._SMALL, **settings})
    architecture(config).save_pretrained(tmp_path)
    for cut in CUTS:
        with pytest.raises(WrongInputError, match=f"{name}: does more between its layers") as wrong:
            _load(tmp_path, cut)
        assert "nodes: 1" in wrong.value.fix
    _load(tmp_path, whole(4))


def test_the_check_of_its_seams_leaves_a_stage_as_it_was(tmp_path: Path) -> None:
    stage = _load(models.make(tmp_path / "model"), CUTS[1])
    before = [type(layer).__name__ for layer in stage.decoder.layers]
    check_seams(stage.model)
    assert [type(layer).__name__ for layer in stage.decoder.layers] == before
    assert before == ["Passthrough", "LlamaDecoderLayer", "LlamaDecoderLayer", "Passthrough"]


def test_what_is_no_language_model_is_refused_by_its_type(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(WrongInputError, match="model_type 'vit' is no causal language model"):
        _load(tmp_path, whole(4))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama-9"}))
    with pytest.raises(WrongInputError, match="llama-9"):
        load_config(tmp_path)


def test_no_code_of_the_model_runs(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    _load(folder, CUTS[0])
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": own, "model_type": "own"}))
    with pytest.raises(WrongInputError, match="contains custom code"):
        _load(folder, CUTS[0])
    assert not mark.exists()


def test_a_passthrough_keeps_what_decoders_read_off_a_layer() -> None:
    foreign = torch.nn.Linear(2, 2)
    foreign.attention_type = "sliding_attention"
    stand_in = Passthrough(foreign)
    assert stand_in.attention_type == "sliding_attention"
    assert not list(stand_in.parameters())
    hidden = torch.randn(1, 2, 3)
    assert stand_in(hidden, attention_mask=None) is hidden


def test_the_decoder_is_the_module_with_embedding_and_layers(tmp_path: Path) -> None:
    stage = _load(models.make(tmp_path / "model"), whole(4))
    assert find_decoder(stage.model) is stage.model.model
    assert (stage.hidden_size, stage.dtype, stage.device) == (64, torch.float32, CPU)
