"""LoRA fine-tuning, tokens/s of a Llama of about 30M parameters in float32, one thread a rank, ranks pinned.

    .venv/bin/python -m tests.benchmarks.finetune

The bubble's ceiling for two stages and m micro-batches is 2m/(m+1) times one process. Two processes that share nothing but
the machine tell what of that its memory and clocks allow.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.benchmarks.cores import median, pin
from tests.ranks import run_ranks

ROWS, LENGTH = 4, 64
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "head_dim": 64,
}


def train(rank: int, folder: Path, stages: int, micro_batches: int) -> float:
    """Tokens/s of one optimizer step's forward and backward passes."""
    import torch

    from launch import model_card
    from launch.chat import Sample
    from launch.finetune import data
    from launch.finetune.pipeline import Pipeline
    from launch.recipe import FinetuneRecipe, parse_dump
    from launch.shard.stage import Stage
    from launch.split import balance

    pin(rank)
    recipe = parse_dump(
        {
            "kind": "finetune",
            "name": "bench",
            "base_model": str(folder),
            "datasets": [{"path": "unused.jsonl", "type": "qa"}],
            "gradient_checkpointing": False,
        }
    )
    assert isinstance(recipe, FinetuneRecipe)
    card = model_card.read(folder)
    cuts = balance(card.layer_bytes, stages=stages, embedding_cost=card.embedding_bytes, head_cost=card.head_cost)
    cut = cuts[rank if stages > 1 else 0]
    strategy = Pipeline(Stage.load(folder, cut, dtype=torch.float32, device=torch.device("cpu")), recipe)
    ids = tuple(range(LENGTH))
    batch = [data.collate([Sample(ids, ids)] * ROWS, torch.device("cpu"), longest=LENGTH) for _ in range(micro_batches)]

    def once() -> float:
        began = time.perf_counter()
        strategy.step(batch)
        for parameter in strategy.parameters():
            parameter.grad = None
        return micro_batches * ROWS * LENGTH / (time.perf_counter() - began)

    return median(once)


def main() -> None:
    """Measure and print."""
    from tests import models

    with tempfile.TemporaryDirectory() as scratch:
        folder = models.make(Path(scratch), vocab_size=2048, num_key_value_heads=8, **SIZES)
        one = run_ranks(train, folder, 1, 8, world=1, seconds=300)[0]
        both = sum(run_ranks(train, folder, 1, 8, world=2, seconds=300))
        print(f"{'one process':<34}{one:8.0f} tokens/s")
        print(f"{'two independent processes':<34}{both:8.0f}   {both / one:.2f} x one process")
        for count in (2, 8, 32):
            speed = run_ranks(train, folder, 2, count, seconds=300)[0]
            bubble = one * 2 * count / (count + 1)
            print(
                f"{f'pipeline, {count} micro-batches':<34}{speed:8.0f}   {speed / one:.2f} x one process, "
                f"{speed / bubble:.2f} of the bubble's ceiling, {speed / both:.2f} of two independent"
            )


if __name__ == "__main__":
    main()
