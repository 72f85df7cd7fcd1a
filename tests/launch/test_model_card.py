"""What a model folder says of itself, and what is said of a broken one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cluster.errors import RefusedError, WrongInputError
from launch import model_card, model_config
from launch.precision import Kind, Precision, Weight, nf4_size
from tests import models

HIDDEN, VOCABULARY, LAYERS = 8, 32, 3
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def _tensors(prefix: str = "model.", layers: int = LAYERS) -> dict[str, torch.Tensor]:
    """A dense model in float16, each layer one row larger than the one before."""
    shapes = {f"{prefix}embed_tokens.weight": (VOCABULARY, HIDDEN), f"{prefix}norm.weight": (HIDDEN,)}
    shapes |= {f"{prefix}layers.{i}.mlp.up_proj.weight": (10 + i, HIDDEN) for i in range(layers)}
    shapes |= {f"{prefix}layers.{i}.input_layernorm.weight": (HIDDEN,) for i in range(layers)}
    return {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}


HEAD = {"lm_head.weight": torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float16)}
EMBEDDING_BYTES = 2 * VOCABULARY * HIDDEN
LAYER_BYTES = tuple(2 * HIDDEN * (11 + i) for i in range(LAYERS))
NORM_BYTES = 2 * HIDDEN


def _save(folder: Path, tensors: dict[str, torch.Tensor], config: Any = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _refusal(folder: Path) -> WrongInputError:
    with pytest.raises(WrongInputError) as wrong:
        model_card.read(folder)
    assert wrong.value.fix
    assert "\n" not in wrong.value.message
    return wrong.value


def test_a_dense_model_is_told_to_the_byte(tmp_path: Path) -> None:
    card = model_card.read(_save(tmp_path / "dense", _tensors() | HEAD))
    assert (card.folder, card.name, card.model_type) == (tmp_path / "dense", "dense", "llama")
    assert (card.layers, card.hidden_size, card.vocab_size, card.max_positions) == (LAYERS, HIDDEN, VOCABULARY, 128)
    assert (card.layer_bytes, card.embedding_bytes) == (LAYER_BYTES, EMBEDDING_BYTES)
    assert card.head_bytes == card.head_cost == EMBEDDING_BYTES + NORM_BYTES
    assert card.parameters == (EMBEDDING_BYTES * 2 + sum(LAYER_BYTES) + NORM_BYTES) // 2
    assert (card.tied, card.has_weights, card.quantized) == (False, True, None)
    assert card.stack[1].weights == (
        Weight("input_layernorm.weight", Kind.OTHER, parameters=HIDDEN, stored=2 * HIDDEN),
        Weight("mlp.up_proj.weight", Kind.LINEAR, 11 * HIDDEN, 22 * HIDDEN, rows=11, columns=HIDDEN),
    )


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_the_card_counts_what_transformers_counts(architecture: str, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", architecture)
    card = model_card.read(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert card.total_bytes == 4 * card.parameters
    for index, layer in enumerate(model.model.layers):
        assert card.layer_bytes[index] == sum(4 * parameter.numel() for parameter in layer.parameters())
    assert card.tied == model.config.tie_word_embeddings


def test_the_last_stage_of_a_tied_model_bears_the_embedding_again(tmp_path: Path) -> None:
    tied = CONFIG | {"tie_word_embeddings": True}
    card = model_card.read(_save(tmp_path / "tied", _tensors(), tied))
    assert (card.tied, card.head_bytes, card.head_cost) == (True, NORM_BYTES, NORM_BYTES + EMBEDDING_BYTES)
    assert card.total_bytes == EMBEDDING_BYTES + sum(LAYER_BYTES) + NORM_BYTES
    # stored twice, but held once
    assert model_card.read(_save(tmp_path / "tied", _tensors() | HEAD, tied)) == card


def test_where_the_configuration_is_silent_the_tensors_tell_whether_the_head_is_tied(tmp_path: Path) -> None:
    silent = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}  # Gemma's, for one
    assert model_card.read(_save(tmp_path / "model", _tensors(), silent)).tied
    assert not model_card.read(_save(tmp_path / "model", _tensors() | HEAD, silent)).tied


def test_layers_beyond_those_of_the_configuration_are_not_counted(tmp_path: Path) -> None:
    plain = model_card.read(_save(tmp_path / "model", _tensors() | HEAD))
    more = _tensors(layers=LAYERS + 1) | HEAD
    more[f"model.layers.{LAYERS}.embed_tokens.weight"] = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float16)
    assert model_card.read(_save(tmp_path / "model", more)) == plain


def test_a_text_model_is_found_inside_a_larger_one(tmp_path: Path) -> None:
    text = {key: value for key, value in CONFIG.items() if key != "model_type"}
    tower = {
        f"vision_tower.encoder.layers.{i}.fc.weight": torch.zeros(50, 8, dtype=torch.float16) for i in range(LAYERS)
    }
    tower["vision_tower.embeddings.patch_embedding.weight"] = torch.zeros(7, 8, dtype=torch.float16)
    folder = _save(
        tmp_path / "model",
        _tensors("model.language_model.") | HEAD | tower,
        {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False},
    )
    card = model_card.read(folder)
    assert (card.model_type, card.layers, card.hidden_size, card.max_positions) == ("gemma3", LAYERS, HIDDEN, 128)
    assert (card.layer_bytes, card.embedding_bytes) == (LAYER_BYTES, EMBEDDING_BYTES)


def test_several_files_with_an_index_are_read_as_one_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    whole = model_card.read(_save(folder, _tensors() | HEAD))
    (folder / "model.safetensors").unlink()
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, (name, tensor) in enumerate((_tensors() | HEAD).items()):
        parts[number % 2][name] = tensor
    files = [f"model-0000{number + 1}-of-00002.safetensors" for number in range(2)]
    for name, part in zip(files, parts, strict=True):
        save_file(part, folder / name)
    _write_index(folder, {key: name for name, part in zip(files, parts, strict=True) for key in part})
    assert model_card.read(folder) == whole


def _write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"a": "model-00001-of-00002.safetensors"}, "names model-00001-of-00002.safetensors, which is not there"),
        ({"a": "../model.safetensors"}, "names '../model.safetensors', which is no plain file name"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd', which is no plain file name"),
        ({"a": ".."}, "names .., which is not there"),
        ({"a": 1}, "names 1, which is no plain file name"),
        ({"a": ["model.safetensors"]}, "is no safetensors index"),
        (["model.safetensors"], "is no safetensors index"),
        ({"a": "x" * 300}, "cannot be read"),
    ],
)
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, names: Any, message: str) -> None:
    folder = _save(tmp_path / "model", _tensors() | HEAD)
    _save(tmp_path, _tensors() | HEAD)  # `../model.safetensors` is there
    _write_index(folder, names)
    assert message in _refusal(folder).message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("\xff", "cannot be read"),
        ("[]", "holds no JSON object"),
        ({key: value for key, value in CONFIG.items() if key != "num_hidden_layers"}, "num_hidden_layers: expected"),
        (CONFIG | {"num_hidden_layers": "3"}, "num_hidden_layers: expected a positive whole number, found '3'"),
        (CONFIG | {"num_hidden_layers": True}, "num_hidden_layers: expected a positive whole number, found True"),
        (CONFIG | {"hidden_size": 0}, "hidden_size: expected a positive whole number, found 0"),
        (CONFIG | {"max_position_embeddings": "many"}, "max_position_embeddings: expected"),
        (CONFIG | {"text_config": "gone"}, "text_config: expected an object, found 'gone'"),
        (CONFIG | {"num_hidden_layers": 5}, "hold nothing of layer 3, though config.json names 5 layers"),
        (CONFIG | {"num_hidden_layers": 10**15}, "hold nothing of layer 3"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tmp_path: Path, config: Any, message: str) -> None:
    folder = _save(tmp_path / "model", _tensors() | HEAD, config if isinstance(config, dict) else "{}")
    if isinstance(config, str):
        (folder / "config.json").write_bytes(config.encode("latin-1"))
    wrong = _refusal(folder)
    assert message in wrong.message
    assert str(folder) in wrong.message


def test_unbounded_positions_are_told_as_such(tmp_path: Path) -> None:
    unbounded = {key: value for key, value in CONFIG.items() if key != "max_position_embeddings"}
    assert model_card.read(_save(tmp_path / "model", _tensors() | HEAD, unbounded)).max_positions is None


def _header(entries: Any, data: int = 0) -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


ENTRY = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is no safetensors file, or cut short (0 bytes)"),
        (b"\x80\x02", "is no safetensors file, or cut short (2 bytes)"),
        (b"\xff" * 64, "is no safetensors file, or cut short (64 bytes)"),
        (_header({"a": ENTRY}, data=7), "cut short: tensor a ends at byte"),
        (_header("no JSON at all"), "header is damaged"),
        (_header("[" * 100_000), "header is damaged"),
        (_header([ENTRY]), "header is damaged"),
        (_header({"a": {"dtype": "F16"}}), "header is damaged"),
        (_header({"a": ENTRY | {"data_offsets": [0]}}, data=8), "header is damaged"),
        (_header({"a": ENTRY | {"data_offsets": [8, 0]}}, data=8), "cut short: tensor a"),
        (_header({"a": ENTRY | {"data_offsets": [-8, 8]}}, data=8), "header is damaged"),
        (_header({"a": ENTRY | {"shape": ["x", 10**15]}}, data=8), "header is damaged"),
    ],
)
def test_a_broken_safetensors_file_is_named(tmp_path: Path, raw: bytes, message: str) -> None:
    folder = _save(tmp_path / "model", _tensors() | HEAD)
    (folder / "model.safetensors").write_bytes(raw)
    wrong = _refusal(folder)
    assert message in wrong.message
    assert str(folder / "model.safetensors") in wrong.message


def test_a_file_that_was_cut_short_while_downloading_is_named(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", _tensors() | HEAD)
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    assert "cut short: tensor" in _refusal(folder).message


def test_a_folder_that_is_no_model_is_told_what_it_lacks(tmp_path: Path) -> None:
    assert "no such model folder" in _refusal(tmp_path / "absent").message
    assert "no such model folder" in _refusal(tmp_path / ("x" * 300)).message
    (tmp_path / "file").write_text("")
    assert "no such model folder" in _refusal(tmp_path / "file").message
    assert "no config.json in it" in _refusal(tmp_path).message
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    unsafe = _refusal(tmp_path)
    assert "no model.safetensors" in unsafe.message
    assert "pickled" in unsafe.fix


def test_a_model_without_an_embedding_beside_its_layers_is_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", {"transformer.h.0.mlp.weight": torch.zeros(2, 2)})
    assert "no embed_tokens.weight" in _refusal(folder).message


# ---- mixtures, quantised checkpoints, adapters, no checkpoint at all

EXPERTS, WIDTH = 4, 6
MIXTURE = CONFIG | {
    "model_type": "qwen3_moe",
    "num_attention_heads": 2,
    "head_dim": 4,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
}


def _mixture() -> dict[str, torch.Tensor]:
    """Experts apart, as published checkpoints have them."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        shapes[f"{mlp}.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            shapes[f"{mlp}.experts.{expert}.gate_proj.weight"] = (WIDTH, HIDDEN)
            shapes[f"{mlp}.experts.{expert}.up_proj.weight"] = (WIDTH, HIDDEN)
            shapes[f"{mlp}.experts.{expert}.down_proj.weight"] = (HIDDEN, WIDTH)
    return {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}


def test_experts_are_one_weight_of_which_a_token_takes_its_share(tmp_path: Path) -> None:
    card = model_card.read(_save(tmp_path / "mixture", _mixture() | HEAD, MIXTURE))
    inside = EXPERTS * 3 * WIDTH * HIDDEN
    experts, router = card.stack[0].weights
    assert (experts.kind, experts.parameters, experts.stored, experts.matrices) == (Kind.EXPERT, inside, 2 * inside, 2)
    assert (router.name, router.kind) == ("mlp.gate.weight", Kind.OTHER)
    assert (card.experts, card.experts_per_token) == (EXPERTS, 2)
    assert card.parameters - card.active == LAYERS * inside / 2 + card.embedding.parameters


def test_a_checkpoint_in_nf4_counts_its_parameters_not_its_bytes(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "plain", hidden_size=256, intermediate_size=512)
    plain = model_card.read(folder)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    quantized.save_pretrained(tmp_path / "nf4")
    card = model_card.read(tmp_path / "nf4")
    assert card.quantized == "nf4"
    assert card.parameters == plain.parameters
    assert [weight.rows for weight in card.stack[0].weights] == [weight.rows for weight in plain.stack[0].weights]
    assert card.total_bytes == sum(
        tensor.numel() * tensor.element_size() for tensor in load_file(tmp_path / "nf4" / "model.safetensors").values()
    )
    # Held, it is what NF4 would have made of the plain one; stored, each matrix has a few words about itself besides.
    nf4, as_stored = Precision("nf4", 2, 2), Precision("stored", 2, 2)
    for made, given in zip(plain.stack, card.stack, strict=True):
        predicted = sum(nf4.size(weight) for weight in made.weights)
        assert sum(as_stored.size(weight) for weight in given.weights) == pytest.approx(predicted, rel=0.02)


def test_nf4_takes_what_bitsandbytes_makes_of_a_matrix() -> None:
    from bitsandbytes.functional import quantize_4bit

    matrix = torch.randn(96, 320, dtype=torch.bfloat16)
    packed, state = quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
    held = [packed, state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code]
    assert nf4_size(matrix.numel()) == sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert 8 * (nf4_size(2**30) - nf4_size(0)) / 2**30 == pytest.approx(4.127, abs=0.0005)


def test_scales_of_fp8_and_mxfp4_are_bytes_but_no_parameters(tmp_path: Path) -> None:
    # save_file knows no FP8 of its own, so headers are written by hand.
    norms = {f"model.layers.{i}.input_layernorm.weight": ("BF16", [128], 256) for i in range(2)}
    ends = {"model.embed_tokens.weight": ("BF16", [8, 128], 2048), "lm_head.weight": ("BF16", [8, 128], 2048)}
    fp8 = {f"model.layers.{i}.mlp.up_proj.weight": ("F8_E4M3", [256, 128], 32768) for i in range(2)}
    fp8 |= {f"model.layers.{i}.mlp.up_proj.weight_scale_inv": ("F32", [2, 1], 8) for i in range(2)}
    mxfp4 = {f"model.layers.{i}.mlp.experts.down_proj_blocks": ("U8", [4, 128, 4, 16], 32768) for i in range(2)}
    mxfp4 |= {f"model.layers.{i}.mlp.experts.down_proj_scales": ("U8", [4, 128, 4], 2048) for i in range(2)}
    mxfp4 |= {f"model.layers.{i}.mlp.experts.down_proj_bias": ("BF16", [4, 128], 1024) for i in range(2)}
    for method, tensors, parameters, stored in (
        ("fp8", fp8, 256 * 128, 32768 + 8),
        ("mxfp4", mxfp4, 4 * 128 * 128 + 4 * 128, 32768 + 2048 + 1024),
    ):
        config = {"model_type": "other", "num_hidden_layers": 2, "quantization_config": {"quant_method": method}}
        card = model_card.read(_by_hand(tmp_path / method, norms | ends | tensors, CONFIG | config))
        assert card.quantized == method
        assert card.stack[0].parameters == parameters + 128
        assert card.layer_bytes == (stored + 256,) * 2


def _by_hand(folder: Path, tensors: dict[str, tuple[str, list[int], int]], config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    entries, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    (folder / "model.safetensors").write_bytes(_header(entries, data=end))
    return folder


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors"])
def test_a_quantisation_that_cannot_be_loaded_is_refused_by_name(method: str, tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", _tensors() | HEAD, CONFIG | {"quantization_config": {"quant_method": method}})
    with pytest.raises(RefusedError, match=f"quantised with '{method}'") as refused:
        model_card.read(folder)
    assert "nf4" in refused.value.fix


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen3-moe", "gpt-oss", "deepseek-v3", "qwen3-next"])
def test_without_weights_the_configuration_tells_the_same(architecture: str, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", architecture)
    there = model_card.read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WrongInputError, match=r"no model\.safetensors"):
        model_card.read(folder)
    told = model_card.read(folder, needs_weights=False)
    assert (there.has_weights, told.has_weights) == (True, False)
    for ours, theirs in zip(told.parts, there.parts, strict=True):
        assert (ours.parameters, ours.cache) == (theirs.parameters, theirs.cache)
        assert ours.stored == pytest.approx(theirs.stored, rel=0.002)  # a router's correction is no parameter


def test_public_checkpoints_take_the_disk_that_their_hubs_say() -> None:
    configs = Path(__file__).parent / "configs"
    for name, gib in {"gpt-oss-120b": 60.8, "minimax-m2": 214.3, "llama-3.1-405b": 756.0}.items():
        config = model_config.parse((configs / f"{name}.json").read_text(), name)
        assert model_card.of_config(config, name).total_bytes / 2**30 == pytest.approx(gib, rel=0.001)


def test_a_configuration_that_does_not_tell_says_what_it_lacks(tmp_path: Path) -> None:
    lacking = {key: value for key, value in MIXTURE.items() if key != "moe_intermediate_size"}
    (tmp_path / "config.json").write_text(json.dumps(lacking))
    with pytest.raises(WrongInputError) as wrong:
        model_card.read(tmp_path, needs_weights=False)
    assert f"{tmp_path}: no model.safetensors" in wrong.value.message
    assert "moe_intermediate_size" in wrong.value.message
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 10**15}))
    with pytest.raises(WrongInputError, match="its sizes cannot be told"):
        model_card.read(tmp_path, needs_weights=False)


def test_an_adapter_is_counted_layer_by_layer(tmp_path: Path) -> None:
    prefix = "base_model.model.model.layers"
    tensors = {f"{prefix}.{layer}.self_attn.q_proj.lora_A.weight": torch.zeros(4, 8) for layer in (0, 2)}
    tensors[f"{prefix}.2.self_attn.q_proj.lora_B.weight"] = torch.zeros(8, 4)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert model_card.adapter_elements(tmp_path, 3) == (32, 0, 64)
    with pytest.raises(WrongInputError, match="is no PEFT adapter folder"):
        model_card.adapter_elements(tmp_path / "absent", 3)
