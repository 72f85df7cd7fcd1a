"""Models in NF4, experts too: they compute what their dequantised weights compute, forwards and backwards, in half the pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from launch import precision
from launch.shard import mxfp4, nf4
from launch.shard.stage import Stage
from launch.split import Cut, whole
from tests import models

CPU = torch.device("cpu")
MIXTURES = ["qwen3-moe", "mixtral", "gpt-oss", "glm4-moe", "deepseek-v3", "minimax-m2", "llama4", "qwen3-next"]


def _load(folder: Path, cut: Cut, quantization: Any = "nf4") -> Stage:
    stage = Stage.load(folder, cut, dtype=torch.float32, device=CPU, quantization=quantization)
    stage.model.train()  # before any forward pass in 4 bits on a CPU, or bitsandbytes repacks what it holds
    return stage


def _dequantized(folder: Path, quantized: Stage, cut: Cut) -> Stage:
    """The same stage in 32 bits, with the weights that the 4 bits stand for."""
    dense = _load(folder, cut, None)
    with torch.no_grad():
        for name, module in quantized.model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                dense.model.get_submodule(name).weight.copy_(weight)
            elif isinstance(module, nf4.ExpertStack):
                dense.model.get_parameter(name).copy_(module.whole())
    return dense


def _logits(stages: list[Stage]) -> torch.Tensor:
    hidden = torch.tensor([list(b"two sparks, one cable"), list(b"one cable, two sparks")])
    positions = torch.arange(hidden.shape[1]).expand_as(hidden)
    for stage in stages:
        hidden = stage.forward(hidden, attention_mask=None, position_ids=positions)
    return hidden


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["llama", "gemma3", *MIXTURES])
def test_every_matrix_of_the_layers_is_in_four_bits_and_computes_as_what_it_stands_for(
    name: str, tmp_path: Path
) -> None:
    folder = models.make(tmp_path / "model", name)
    halves = [_load(folder, cut) for cut in (Cut(0, 2, 4), Cut(2, 4, 4))]
    dense = _dequantized(folder, _load(folder, whole(4)), whole(4))
    with torch.no_grad():
        torch.testing.assert_close(_logits(halves), _logits([dense]), rtol=1e-4, atol=1e-4)
    left = [
        n
        for stage in halves
        for n, p in stage.model.named_parameters()
        if "layers." in n and p.ndim > 1 and p.is_floating_point()
    ]
    assert all(n.split(".")[-2] in ("gate", "router", "conv1d") or n.endswith("bias") for n in left), left


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3"])
def test_what_is_held_is_what_the_plan_says(name: str, tmp_path: Path) -> None:
    stage = _load(models.make(tmp_path / "model", name), whole(4))
    for module in stage.model.modules():
        if isinstance(module, nf4.ExpertStack):
            held = sum(tensor.numel() * tensor.element_size() for tensor in module.buffers())
            assert held == pytest.approx(precision.nf4_size(module.shape.numel()), rel=0.1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss", "llama4"])
def test_gradients_are_those_of_the_dequantised_model(name: str, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", name)
    quantized = _load(folder, whole(4))
    dense = _dequantized(folder, quantized, whole(4))
    found = []
    for stage in (quantized, dense):
        embedding = stage.decoder.embed_tokens.weight
        embedding.requires_grad_(True)
        logits = _logits([stage])
        logits.square().mean().backward()
        found.append(embedding.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)
    assert found[0].abs().max() > 1e-4


def test_autograd_keeps_no_dequantised_expert(tmp_path: Path) -> None:
    stage = _load(models.make(tmp_path / "model", "qwen3-moe"), whole(4))
    experts = stage.decoder.layers[1].mlp.experts
    kept: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    hidden = torch.randn(6, 64, requires_grad=True)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = experts(hidden, chosen, torch.full((6, 2), 0.5))
    matrices = {torch.Size((64, 64)), torch.Size((64, 32)), torch.Size((32, 64))}
    assert not matrices & set(kept)
    out.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_quantising_in_pieces_gives_the_bytes_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "PIECE", 1 << 12)
    matrix = torch.randn(96, 320)
    packed, state = nf4.quantize(matrix)
    expected, known = bnb.functional.quantize_4bit(matrix, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(packed, expected)
    assert torch.equal(state.absmax, known.absmax)
    assert torch.equal(state.state2.absmax, known.state2.absmax)
    again = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(again, bnb.functional.dequantize_4bit(expected, known))
    assert (again - matrix).abs().mean() < 0.1


def test_mxfp4_is_unpacked_as_transformers_does() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(1)
    blocks = torch.randint(0, 256, (3, 40, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 40, 2), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    for index in range(3):
        assert torch.equal(mxfp4.unpack(blocks[index], scales[index], torch.float32), expected[index])


def test_a_hook_changes_what_an_expert_is() -> None:
    stack = nf4.ExpertStack((2, 64, 64), torch.float32)
    stack.allocate(CPU)
    for index in range(2):
        stack.put(index, torch.randn(64, 64))
    plain = stack[1]
    change = nn.Parameter(torch.ones(64, 64))
    stack.adapt = lambda index, matrix: matrix + index * change
    assert torch.equal(stack[1], plain + 1)
    assert torch.equal(stack[0], stack.dequantized(0))
