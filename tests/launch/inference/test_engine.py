"""Two ranks give token for token what `generate` gives in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launch import model_card
from launch.inference.engine import Engine, Running
from launch.inference.request import Sampling
from launch.shard.stage import Stage
from launch.split import balance, whole
from tests import models
from tests.ranks import run_ranks

PROMPTS = [
    list(b"two sparks"),
    list(b"one cable, used as one machine"),
    list(b"hi"),
    list(b"half of the model on each box"),
    list(b"link"),
]
NEW_TOKENS = 16


def engine(folder: Path, rank: int, world: int) -> Engine:
    card = model_card.read(folder)
    cuts = balance(card.layer_bytes, stages=world, embedding_cost=card.embedding_bytes, head_cost=card.head_cost)
    return Engine(Stage.load(folder, cuts[rank], dtype=torch.float32, device=torch.device("cpu")), pad_token=257)


def answer(rank: int, folder: Path, world: int, samplings: list[Sampling], stop: frozenset[int]) -> list[list[int]]:
    """What every rank of the test does: rank 0 asks all prompts, the other follows."""
    made = engine(folder, rank, world)
    if rank > 0:
        made.follow()
        return []
    sequences = [
        Running(prompt, NEW_TOKENS, sampling, stop) for prompt, sampling in zip(PROMPTS, samplings, strict=True)
    ]
    made.generate(sequences, max_rows=4)
    made.close()
    return [sequence.tokens for sequence in sequences]


def reference(folder: Path, prompts: list[list[int]], **how: Any) -> list[list[int]]:
    """`generate` of the whole model in this process, the prompts padded on the left into one batch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[257] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    drawn = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, pad_token_id=257, **{"do_sample": False, **how}
    )
    return [row[longest:].tolist() for row in drawn]


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_two_ranks_draw_the_tokens_of_generate(architecture: str, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", architecture)
    greedy = [Sampling()] * len(PROMPTS)
    split = run_ranks(answer, folder, 2, greedy, frozenset())[0]
    assert split == [reference(folder, [prompt], eos_token_id=-1)[0] for prompt in PROMPTS]
    assert split == reference(folder, PROMPTS, eos_token_id=-1)  # left-padded, all in one batch
    assert len({tuple(tokens) for tokens in split}) == len(PROMPTS), (
        "the answers must differ, or equality would say little"
    )


def test_a_sequence_ends_at_its_own_end_token_while_its_neighbours_go_on(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    free = [reference(folder, [prompt], eos_token_id=-1)[0] for prompt in PROMPTS]
    stop = frozenset({free[0][3], free[1][6]})
    split = run_ranks(answer, folder, 2, [Sampling()] * len(PROMPTS), stop)[0]
    for tokens, unstopped in zip(split, free, strict=True):
        ends = [index for index, token in enumerate(unstopped) if token in stop]
        assert tokens == unstopped[: ends[0] + 1 if ends else None]


def test_a_seed_draws_the_same_answer_split_or_whole_and_whatever_runs_beside_it(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    samplings = [Sampling(temperature=0.9, top_p=0.8, top_k=50, seed=seed) for seed in range(len(PROMPTS))]
    split = run_ranks(answer, folder, 2, samplings, frozenset())[0]
    alone = Engine(Stage.load(folder, whole(4), dtype=torch.float32, device=torch.device("cpu")), pad_token=257)
    for prompt, sampling, tokens in zip(PROMPTS, samplings, split, strict=True):
        single = Running(prompt, NEW_TOKENS, sampling)
        alone.generate([single], max_rows=1)
        assert single.tokens == tokens
    greedy = reference(folder, PROMPTS, eos_token_id=-1)
    assert sum(a != b for a, b in zip(split, greedy, strict=True)) >= 4, "sampling must not be greedy"
