"""Decoding, tokens/s of a Llama of about 100M parameters in float32, one thread a rank, ranks pinned.

    .venv/bin/python -m tests.benchmarks.serve

Two groups in flight should come close to what two processes reach that share nothing but the machine (the ceiling); one
group leaves each stage idle half of the time.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.benchmarks.cores import median, pin
from tests.ranks import run_ranks

NEW_TOKENS = 24
PROMPT = list(b"two sparks on one cable")
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "head_dim": 64,
}


def decode(rank: int, folder: Path, stages: int, rows: int) -> float:
    """Tokens/s of `rows` sequences over `stages` stages, as rank 0 sees it."""
    import torch

    from launch import model_card
    from launch.inference.engine import Engine, Running
    from launch.shard.stage import Stage
    from launch.split import balance

    pin(rank)
    card = model_card.read(folder)
    cuts = balance(card.layer_bytes, stages=stages, embedding_cost=card.embedding_bytes, head_cost=card.head_cost)
    cut = cuts[rank if stages > 1 else 0]
    engine = Engine(Stage.load(folder, cut, dtype=torch.float32, device=torch.device("cpu")), pad_token=257)
    if stages > 1 and rank > 0:
        engine.follow()
        return 0.0

    def once() -> float:
        sequences = [Running(PROMPT, NEW_TOKENS) for _ in range(rows)]
        began = time.perf_counter()
        engine.generate(sequences, max_rows=rows)
        return rows * NEW_TOKENS / (time.perf_counter() - began)

    speed = median(once)
    engine.close()
    return speed


def main() -> None:
    """Measure and print."""
    from tests import models

    with tempfile.TemporaryDirectory() as scratch:
        folder = models.make(Path(scratch), vocab_size=2048, num_key_value_heads=12, **SIZES)
        one = run_ranks(decode, folder, 1, 1, world=1, seconds=300)[0]
        ceiling = sum(run_ranks(decode, folder, 1, 1, world=2, seconds=300))
        print(f"{'one process':<34}{one:8.1f} tokens/s")
        print(f"{'two independent processes':<34}{ceiling:8.1f}   {ceiling / one:.2f} x one process (the ceiling)")
        for rows, what in ((1, "two ranks, one group"), (2, "two ranks, two groups")):
            speed = run_ranks(decode, folder, 2, rows, seconds=300)[0]
            print(f"{what:<34}{speed:8.1f}   {speed / one:.2f} x one process, {speed / ceiling:.2f} of the ceiling")


if __name__ == "__main__":
    main()
