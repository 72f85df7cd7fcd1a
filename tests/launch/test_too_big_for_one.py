"""A model that no single host can hold: both hosts together answer with it, one alone is killed for trying."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import models
from tests.laptop import Laptop, laptop_with_pair

pytestmark = pytest.mark.timeout(900)  # two loads, which take half a minute where nothing else runs

MEMORY = 3 << 30  # bytes of each host
# 1.01 billion parameters: 2 GB in 16 bits on the disk, 4 GB in the 32 bits that a CPU computes in.
HIDDEN, WIDE, LAYERS = 2048, 4096, 24
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "dtype": "bfloat16",
}


def write_model(folder: Path) -> None:
    """The files of a Llama, its weights one small block of random numbers over and over."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=264, max_position_embeddings=512, eos_token_id=256, bos_token_id=None, pad_token_id=257, **SHAPE
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    header, end = {}, 0
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    for name, tensor in shapes.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    block = (torch.randn(8 << 20, generator=torch.manual_seed(7)) * 0.02).to(torch.bfloat16)
    data = block.view(torch.uint8).numpy().tobytes()
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(end, 0, -len(data)):
            file.write(data[:left])


@pytest.fixture(scope="module")
def small_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """A pair whose hosts have 3 GiB each, and the model on both, on real disk: what is on tmpfs would count as memory."""
    disk = tmp_path_factory.mktemp("disk")
    write_model(disk / "spark-a" / "big")
    (disk / "spark-b" / "big").mkdir(parents=True)
    for path in (disk / "spark-a" / "big").iterdir():
        path.chmod(0o644)
        os.link(path, disk / "spark-b" / "big" / path.name)
    with laptop_with_pair(tmp_path_factory.mktemp("shared"), memory=MEMORY, models=disk) as laptop:
        yield laptop
    (disk / "spark-a" / "big" / "model.safetensors").unlink()
    (disk / "spark-b" / "big" / "model.safetensors").unlink()


def test_both_hosts_answer_with_it_and_one_is_killed(small_hosts: Laptop) -> None:
    (small_hosts.shared / "big.yaml").write_text(
        "kind: inference\nbase_model: /srv/models/big\nmax_model_len: 64\nmax_num_seqs: 1\n"
    )
    both = small_hosts("ask", "big.yaml", "Does it fit?", "--max-tokens", "3", "--json", seconds=400)
    assert both.returncode == 0, both.stderr
    (answer,) = json.loads(both.stdout)
    assert answer["tokens"] == 3 or answer["finish_reason"] == "stop"
    alone = ["big.yaml", "--set", "nodes=1"]
    refused = small_hosts("run", *alone, seconds=400)
    assert refused.returncode == 3, refused.stderr
    assert "does not fit" in refused.stderr
    forced = small_hosts("run", *alone, "--force", seconds=400)
    assert forced.returncode == 1, forced.stderr
    # By its agent, before the host would freeze; by the kernel, where memory was taken faster than the agent looks.
    assert "GiB of memory were available" in forced.stderr or "SIGKILL" in forced.stderr, forced.stderr
