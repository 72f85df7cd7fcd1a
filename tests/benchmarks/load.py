"""What loading costs: bytes read, peak of memory and time, of each half as a rank loads it and of the whole by transformers.

    python -m tests.benchmarks.load [--layers 16] [--rounds 3]

Each load has a process of its own. What it holds is counted from its tensors, the peak from VmHWM, bytes read from /proc/self/io.
`from_pretrained` maps its files: they count as read, and every tensor is touched once, as computing would.
Bars: read 1.08 x own, peak 1.15 x held (1.3 with experts).
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from launch.shard.stage import Stage
from launch.split import Cut, whole
from tests import models
from tests.launch.shard import hollow
from tests.ranks import run_ranks

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16},
    "qwen3_moe": {
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "num_experts": 32,
        "num_experts_per_tok": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
}


@dataclass
class Cost:
    """Of one load: bytes held when done, the peak beyond what the process had before, bytes read, and seconds."""

    held: int
    peak: int
    read: int
    seconds: float


def ours(_rank: int, folder: Path, start: int, end: int, layers: int) -> Cost:
    """A stage, as a rank loads it."""
    Stage.load(models.make(folder.parent / "small", "qwen3-moe"), whole(4), dtype=torch.bfloat16, device=CPU)
    memory, read, began = _number("status", "VmRSS") * 1024, _number("io", "rchar"), time.monotonic()
    stage = Stage.load(folder, Cut(start, end, layers), dtype=torch.bfloat16, device=CPU)
    seconds = time.monotonic() - began
    return Cost(_held(stage.model), _number("status", "VmHWM") * 1024 - memory, _number("io", "rchar") - read, seconds)


def theirs(_rank: int, folder: Path) -> Cost:
    """The whole model, as every rank of other tools loads it."""
    small = models.make(folder.parent / "small", "qwen3-moe")
    transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
    memory, began = _number("status", "VmRSS") * 1024, time.monotonic()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for tensor in model.parameters():
        tensor.view(-1)[::1024].sum()
    seconds = time.monotonic() - began
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Cost(_held(model), _number("status", "VmHWM") * 1024 - memory, size, seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(f"16-bit weights, medians of {given.rounds}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':34}{'held':>9}{'peak / held':>13}{'read / held':>13}{'seconds':>9}")
    for name in MODELS:
        with tempfile.TemporaryDirectory() as place:
            folder = _make(Path(place) / "model", name, given.layers)
            half = given.layers // 2
            for start, end in ((0, half), (half, given.layers)):
                rounds = [_one(ours, folder, start, end, given.layers) for _ in range(given.rounds)]
                _show(f"{name}, layers {start} to {end - 1}, ours", rounds)
            _show(f"{name}, all, from_pretrained", [_one(theirs, folder) for _ in range(given.rounds)])


def _make(folder: Path, name: str, layers: int) -> Path:
    changes = {"vocab_size": 264, "num_hidden_layers": layers, "head_dim": 128, "tie_word_embeddings": False}
    return hollow.make(folder, transformers.AutoConfig.for_model(name, **changes, **MODELS[name]))


def _one(body: Any, *arguments: Any) -> Cost:
    cost = run_ranks(body, *arguments, world=1, seconds=300)[0]
    assert isinstance(cost, Cost)
    return cost


def _show(what: str, rounds: list[Cost]) -> None:
    held = rounds[0].held
    peak, read = median(one.peak for one in rounds) / held, median(one.read for one in rounds) / held
    seconds = median(one.seconds for one in rounds)
    print(f"{what:34}{held / 1e6:6.0f} MB{peak:13.3f}{read:13.3f}{seconds:9.1f}")


def _held(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


def _number(file: str, key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/self/{file}").read_text())
    assert found is not None, key
    return int(found[1])


if __name__ == "__main__":
    main()
