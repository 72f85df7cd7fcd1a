"""An NF4 copy is the model that quantising while loading makes, needs little memory to make, and is whole or not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cluster.errors import RefusedError, WrongInputError
from launch import model_card
from launch.shard import quantize
from launch.shard.stage import Stage
from launch.split import Cut, whole
from tests import models
from tests.launch.shard import hollow
from tests.launch.shard.test_nf4 import _logits
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _load(folder: Path, cut: Cut, quantization: Any = None) -> Stage:
    stage = Stage.load(folder, cut, dtype=torch.float32, device=CPU, quantization=quantization)
    stage.model.train()
    return stage


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-moe", "gpt-oss", "deepseek-v3", "mixtral"])
def test_a_copy_is_what_quantising_while_loading_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize.Writer.__init__, "__defaults__", (100_000,))
    source = models.make(tmp_path / "model", name)
    made = quantize.quantize(source, tmp_path / "copy")
    assert made.after < made.before
    assert len(list(made.folder.glob("*.safetensors"))) > 1
    with torch.no_grad():
        expected = _logits([_load(source, whole(4), "nf4")])
        assert torch.equal(_logits([_load(made.folder, whole(4))]), expected)
        halves = [_load(made.folder, cut) for cut in (Cut(0, 2, 4), Cut(2, 4, 4))]
        torch.testing.assert_close(_logits(halves), expected, rtol=0, atol=1e-5)
    assert model_card.read(made.folder).quantized == "nf4"
    transformers.AutoTokenizer.from_pretrained(made.folder)


def test_transformers_itself_loads_a_copy_of_a_model_without_experts(tmp_path: Path) -> None:
    made = quantize.quantize(models.make(tmp_path / "model"), tmp_path / "copy")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        made.folder, dtype=torch.float32, device_map="cpu"
    ).train()
    ids = torch.tensor([list(b"two sparks, one cable"), list(b"one cable, two sparks")])
    with torch.no_grad():
        expected = _logits([_load(made.folder, whole(4))])
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def _as_mxfp4(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A gpt-oss checkpoint as it is published; returns what its experts stand for."""
    from launch.shard import mxfp4

    torch.manual_seed(3)
    folder.mkdir()
    tensors, stand_for = load_file(source / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 124, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        stand_for[name] = torch.stack([mxfp4.unpack(b, s, torch.float32) for b, s in zip(blocks, scales, strict=True)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    about = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return stand_for


@pytest.mark.timeout(600)
def test_mxfp4_becomes_nf4(tmp_path: Path) -> None:
    source = models.make(tmp_path / "model", "gpt-oss")
    stand_for = _as_mxfp4(source, tmp_path / "mxfp4")
    tensors = load_file(source / "model.safetensors") | stand_for
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        expected = _logits([_load(source, whole(4), "nf4")])
        assert torch.equal(_logits([_load(tmp_path / "mxfp4", whole(4), "nf4")]), expected)
        made = quantize.quantize(tmp_path / "mxfp4", tmp_path / "copy")
        assert torch.equal(_logits([_load(made.folder, whole(4))]), expected)


@pytest.mark.timeout(900)
def test_the_memory_it_takes_does_not_grow_with_the_model(tmp_path: Path) -> None:
    sizes = {"vocab_size": 264, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    config = transformers.AutoConfig.for_model("llama", num_hidden_layers=16, num_key_value_heads=8, **sizes)
    source = hollow.make(tmp_path / "model", config)
    grown, written = run_ranks(_quantize, source, world=1)[0]
    assert written > 120e6
    assert grown < 0.6 * written


def _quantize(_rank: int, source: Path) -> tuple[int, int]:
    quantize.quantize(models.make(source.parent / "small"), source.parent / "first")  # what is imported on first use
    before = _memory("VmRSS")
    made = quantize.quantize(source, source.parent / "copy")
    return _memory("VmHWM") - before, made.after


def _memory(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_nothing_is_left_of_a_copy_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.make(tmp_path / "model")

    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantize.Writer, "close", full)
    with pytest.raises(WrongInputError, match=r"cannot be written .*No space left"):
        quantize.quantize(source, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_there_or_in_four_bits_already_is_left_alone(tmp_path: Path) -> None:
    source = models.make(tmp_path / "model")
    with pytest.raises(WrongInputError, match="is there already"):
        quantize.quantize(source, source)
    copy = quantize.quantize(source, tmp_path / "copy").folder
    with pytest.raises(RefusedError, match="comes in NF4"):
        quantize.quantize(copy, tmp_path / "again")
