"""Loading takes what a stage holds and hardly more, reads each byte once, and says what is wrong before it begins."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import RefusedError, WrongInputError
from launch.shard.stage import Stage
from launch.split import Cut, whole
from tests import models
from tests.launch.shard import hollow
from tests.ranks import run_ranks

CPU = torch.device("cpu")
# Half of each is more than 350 MB in 16 bits: what a process needs besides is small against it.
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 16, "num_attention_heads": 16},
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "hidden_size": 1024,
            "moe_intermediate_size": 512,
            "num_experts": 32,
            "num_experts_per_tok": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
    ),
}


@dataclass
class Cost:
    """Of loading one stage, in bytes."""

    held: int
    peak: int
    read: int
    own: int


def _large(folder: Path, name: str, layers: int = 8) -> Path:
    import transformers

    model_type, sizes = LARGE[name]
    changes = {"vocab_size": 264, "num_hidden_layers": layers, "head_dim": 128, "tie_word_embeddings": False}
    return hollow.make(folder, transformers.AutoConfig.for_model(model_type, **changes, **sizes))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "most"), [("llama", 1.15), ("qwen3-moe", 1.3)])
def test_a_stage_takes_its_own_bytes_and_reads_each_once(name: str, most: float, tmp_path: Path) -> None:
    cost = run_ranks(_load, _large(tmp_path / "model", name), None, world=1)[0]
    assert cost.held > 300e6
    assert cost.peak < most * cost.held
    assert cost.read < 1.08 * cost.own


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "most"), [("llama", 1.15), ("qwen3-moe", 1.3)])
def test_quantising_on_the_way_takes_little_more_than_what_is_held(name: str, most: float, tmp_path: Path) -> None:
    cost = run_ranks(_load, _large(tmp_path / "model", name, layers=20), "nf4", world=1)[0]
    assert cost.held < 0.27 * cost.own, "a quarter, and the statistics"
    assert cost.peak < most * cost.held
    assert cost.read < 1.08 * cost.own


def _load(_rank: int, folder: Path, quantization: Any) -> Cost:
    # What is imported or kept for good on first use.
    small = models.make(folder.parent / "small", "qwen3-moe")
    Stage.load(small, whole(4), dtype=torch.bfloat16, device=CPU, quantization=quantization)
    memory, read = _memory("VmRSS"), _read()
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    half = Cut(0, layers // 2, layers)
    stage = Stage.load(folder, half, dtype=torch.bfloat16, device=CPU, quantization=quantization)
    peak, read = _memory("VmHWM") - memory, _read() - read
    held = sum(t.numel() * t.element_size() for t in [*stage.model.parameters(), *stage.model.buffers()])
    held += sum(_statistics(module) for module in stage.model.modules())
    elements = sum(
        int(torch.Size(shape).numel())
        for file in folder.glob("*.safetensors")
        for name, shape in _shapes(file).items()
        if "embed" in name or ((layer := re.search(r"layers\.(\d+)\.", name)) and int(layer[1]) < half.end)
    )
    return Cost(held, peak, read, 2 * elements)


def _statistics(module: Any) -> int:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None:
        return 0
    tensors = [state.absmax, state.state2.absmax]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _shapes(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: about["shape"] for name, about in header.items() if name != "__metadata__"}


def _memory(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _read() -> int:
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make(tmp_path_factory.mktemp("good") / "model", "qwen3-moe")


def _change(good: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    shutil.copytree(good, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


EXPERT = "model.layers.2.mlp.experts.1.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({NORM: None}, rf"1 tensors of .* are not in the checkpoint, first {NORM}"),
        ({EXPERT: None}, r"layers.2.mlp.experts.gate_up_proj is made of 4 experts, but the checkpoint has 3 like"),
        ({NORM: torch.zeros(65)}, rf"{NORM} is 65, but config.json makes {NORM} 64"),
        ({EXPERT: torch.zeros(31, 64)}, rf"{EXPERT} is 31 x 64, not 32 x 64"),
        (
            {f"model.layers.0.mlp.experts.{e}.down_proj.weight": torch.zeros(64, 16) for e in range(4)},
            r"down_proj.weight is 4 x 64 x 16, but config.json makes model.layers.0.mlp.experts.down_proj 4 x 64 x 32",
        ),
    ],
    ids=["missing", "missing expert", "wrong shape", "one wrong expert", "all experts wrong"],
)
def test_what_is_wrong_is_named_before_anything_is_loaded(
    changes: dict[str, Any], said: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _change(good, tmp_path / "model", **changes)
    monkeypatch.setattr("launch.shard.checkpoint.Checkpoint.read", _never)
    for quantization in (None, "nf4"):
        with pytest.raises(WrongInputError, match=said):
            Stage.load(folder, whole(4), dtype=torch.float32, device=CPU, quantization=quantization)  # type: ignore[arg-type]


def _never(*_arguments: Any) -> None:
    raise AssertionError("a tensor was read")


def test_a_file_cut_short_or_not_there_is_named(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WrongInputError, match=r"cut short: tensor .* ends at byte"):
        Stage.load(folder, whole(4), dtype=torch.float32, device=CPU)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WrongInputError, match=r"names model-00002-of-00002\.safetensors, which is not there"):
        Stage.load(folder, whole(4), dtype=torch.float32, device=CPU)


def test_a_stage_does_not_ask_for_the_tensors_of_others(good: Path, tmp_path: Path) -> None:
    folder = _change(good, tmp_path / "model", **{EXPERT: None})
    Stage.load(folder, Cut(0, 2, 4), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "comes in FP8, which would be expanded to 16 bits on cpu",
        ),
        ({"quant_method": "mxfp4"}, "comes in MXFP4, which would be expanded to 16 bits"),
        ({"quant_method": "gptq", "bits": 4}, "comes in GPTQ, which cannot be loaded in stages"),
    ],
)
def test_what_would_silently_be_expanded_is_refused(
    about: dict[str, Any], said: str, good: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    with pytest.raises(RefusedError, match=said) as refused:
        Stage.load(folder, whole(4), dtype=torch.float32, device=CPU)
    assert "nf4" in refused.value.fix


def test_the_settings_of_generation_come_with_the_model(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "eos_token_id": [7, 9]}))
    stage = Stage.load(folder, whole(4), dtype=torch.float32, device=CPU)
    assert stage.model.generation_config.eos_token_id == [7, 9]
    assert stage.model.name_or_path == str(folder)
