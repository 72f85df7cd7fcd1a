"""What a model folder says of itself, and what is said of a broken one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from cluster.errors import WrongInputError
from launch import model_card
from launch.model_card import ModelCard
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
    assert model_card.read(_save(tmp_path / "dense", _tensors() | HEAD)) == ModelCard(
        folder=tmp_path / "dense",
        model_type="llama",
        layers=LAYERS,
        hidden_size=HIDDEN,
        vocab_size=VOCABULARY,
        max_positions=128,
        tied=False,
        layer_bytes=LAYER_BYTES,
        embedding_bytes=EMBEDDING_BYTES,
        head_bytes=EMBEDDING_BYTES + NORM_BYTES,
        parameters=(EMBEDDING_BYTES * 2 + sum(LAYER_BYTES) + NORM_BYTES) // 2,
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
