"""Two ranks learn exactly what one process learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from peft import PeftModel
from torch.nn import functional

from launch import model_card
from launch.agent.report import Reporter
from launch.chat import IGNORED, Sample
from launch.finetune import adapt, data, loop
from launch.finetune.data import Corpus
from launch.finetune.pipeline import Pipeline
from launch.recipe import FinetuneRecipe, parse_dump
from launch.shard.stage import Stage
from launch.split import balance, whole
from tests import models
from tests.ranks import run_ranks

STEPS = 20
TOLERANCE = 1e-6
# Adam divides a gradient by its own size, so that rounding shows in a weight whose gradient is all but zero: 20 steps of 5e-3
# could move it by 0.1 in all.
WEIGHT_TOLERANCE = 1e-5
CPU = torch.device("cpu")


def recipe(folder: Path, **changes: Any) -> FinetuneRecipe:
    settings: dict[str, Any] = {
        "kind": "finetune",
        "name": "parity",
        "base_model": str(folder),
        "datasets": [{"path": "unused.jsonl", "type": "qa"}],
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.2,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "gradient_checkpointing": False,
        "sequence_len": 64,
        "seed": 3,
    }
    made = parse_dump({**settings, **changes})
    assert isinstance(made, FinetuneRecipe)
    return made


def uneven_samples() -> list[Sample]:
    """17 samples of very different lengths and label counts, so that every mean of means would be wrong."""
    text = b"sparks and cables, links and ranks, stages and slots, and one model that neither box can hold. " * 2
    made = []
    for index in range(17):
        ids = tuple(text[index * 3 : index * 3 + 6 + (index * 7) % 40])
        masked = 1 + (index * 5) % (len(ids) - 2)
        made.append(Sample(ids, (IGNORED,) * masked + ids[masked:]))
    return made


def train(rank: int, world: int, wanted: FinetuneRecipe, out: Path) -> list[tuple[float, float]]:
    """What each rank of the test does; returns loss and accuracy of each step."""
    folder = Path(wanted.base_model)
    card = model_card.read(folder)
    cuts = balance(card.layer_bytes, stages=world, embedding_cost=card.embedding_bytes, head_cost=card.head_cost)
    stage = Stage.load(folder, cuts[rank], dtype=torch.float32, device=CPU)
    strategy = Pipeline(stage, wanted)
    tallies = loop.train(strategy, wanted, Corpus(tuple(uneven_samples()), ()), None, Reporter())
    strategy.save(adapter=out / "adapter", model=out / "model", tokenizer=models.tokenizer())
    return [(tally.loss, tally.accuracy) for tally in tallies]


def one_process(wanted: FinetuneRecipe) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The reference: the whole model with peft, torch's clipping, transformers' schedule, a mask, and none of our loop."""
    nf4: Literal["nf4"] | None = "nf4" if wanted.adapter == "qlora" else None
    stage = Stage.load(Path(wanted.base_model), whole(4), dtype=torch.float32, device=CPU, quantization=nf4)
    model = stage.model if wanted.adapter == "full" else adapt.add_lora(stage, wanted)
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=wanted.learning_rate, weight_decay=wanted.weight_decay)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(wanted.warmup_ratio * STEPS), STEPS)
    batches = data.steps(uneven_samples(), rows_each=2, micro_batches=3, seed=wanted.seed, total=STEPS)
    history = []
    for step in batches:
        learned = sum(sample.learned for chunk in step for sample in chunk)
        loss_sum = correct = 0.0
        for chunk in step:
            batch = data.collate(chunk, CPU, longest=64)
            mask = (
                torch.arange(batch.input_ids.shape[1]) < torch.tensor([[len(sample.ids)] for sample in chunk])
            ).long()
            logits = model(input_ids=batch.input_ids, attention_mask=mask).logits
            loss = functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            (loss / learned).backward()
            loss_sum += float(loss.detach())
            correct += float((logits.argmax(-1) == batch.labels).sum())
        torch.nn.utils.clip_grad_norm_(trained.values(), wanted.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append((loss_sum / learned, correct / learned))
    return history, {name: parameter.detach() for name, parameter in trained.items()}


def assert_same_history(ours: list[tuple[float, float]], reference: list[tuple[float, float]]) -> None:
    assert len(ours) == len(reference) == STEPS
    assert ours[-1][0] < ours[0][0] * 0.9, "it must have learned something"
    for (loss, accuracy), (expected_loss, expected_accuracy) in zip(ours, reference, strict=True):
        assert abs(loss - expected_loss) <= TOLERANCE
        assert accuracy == pytest.approx(expected_accuracy)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
def test_two_ranks_learn_the_lora_weights_of_one_process(
    architecture: str, checkpointing: bool, tmp_path: Path
) -> None:
    wanted = recipe(models.make(tmp_path / "base", architecture), gradient_checkpointing=checkpointing)
    history, weights = one_process(wanted)
    split = run_ranks(train, 2, wanted, tmp_path)
    assert split[0] == split[1], "both ranks know the same losses"
    assert_same_history(split[0], history)
    whole_model = transformers.AutoModelForCausalLM.from_pretrained(wanted.base_model, dtype=torch.float32)
    merged = dict(PeftModel.from_pretrained(whole_model, tmp_path / "adapter").named_parameters())
    assert len(weights) > 30
    for name, weight in weights.items():
        assert (merged[name] - weight).abs().max() <= WEIGHT_TOLERANCE, name


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_two_ranks_learn_the_full_weights_of_one_process(architecture: str, tmp_path: Path) -> None:
    wanted = recipe(models.make(tmp_path / "base", architecture), adapter="full", learning_rate=1e-3)
    history, weights = one_process(wanted)
    assert_same_history(run_ranks(train, 2, wanted, tmp_path)[0], history)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, weight in saved.named_parameters():
        assert (weights[name] - weight).abs().max() <= TOLERANCE, name


def test_one_rank_of_our_own_learns_the_same_as_the_reference(tmp_path: Path) -> None:
    wanted = recipe(models.make(tmp_path / "base"))
    history, _ = one_process(wanted)
    assert_same_history(train(0, 1, wanted, tmp_path), history)


def test_evaluation_gives_the_loss_of_one_process_and_changes_nothing(tmp_path: Path) -> None:
    wanted = recipe(models.make(tmp_path / "base"))
    split, alone = run_ranks(evaluate, 2, wanted), evaluate(0, 1, wanted)
    assert split[0] == split[1]
    assert split[0][0] == pytest.approx(alone[0], abs=TOLERANCE)
    assert split[0][0] == split[0][1], "a second evaluation gives the same"


def evaluate(rank: int, world: int, wanted: FinetuneRecipe) -> tuple[float, float]:
    card = model_card.read(Path(wanted.base_model))
    cuts = balance(card.layer_bytes, stages=world, embedding_cost=card.embedding_bytes, head_cost=card.head_cost)
    strategy = Pipeline(Stage.load(Path(wanted.base_model), cuts[rank], dtype=torch.float32, device=CPU), wanted)
    batch = [data.collate(chunk, CPU, longest=64) for chunk in data.chunks(uneven_samples(), 2)]
    return strategy.evaluate(batch).loss, strategy.evaluate(batch).loss
