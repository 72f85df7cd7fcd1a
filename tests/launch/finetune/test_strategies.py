"""Two ranks of every strategy learn what one process learns, and go on from their checkpoints as if they had never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from launch.agent.report import Reporter
from launch.chat import Sample
from launch.finetune import data, loop
from launch.finetune.checkpoint import Checkpoints
from launch.finetune.data import Corpus
from launch.finetune.pipeline import Pipeline
from launch.recipe import FinetuneRecipe
from launch.shard.stage import Stage
from launch.spec import JobSpec, RankSpec
from launch.split import whole
from tests import models
from tests.launch.finetune.test_checkpoint import SETTINGS, CutOff
from tests.launch.finetune.test_pipeline import CPU, STEPS, one_process, recipe, uneven_samples
from tests.ranks import run_ranks

TOLERANCE = 1e-4


def rows(wanted: FinetuneRecipe) -> Sequence[Sample]:
    samples = uneven_samples()
    if not wanted.sample_packing:
        return samples
    return data.packed(samples, [len(sample.ids) for sample in samples], seed=wanted.seed, longest=wanted.sequence_len)


def alone(_rank: int, wanted: FinetuneRecipe) -> list[float]:
    """What one process makes of it."""
    stage = Stage.load(Path(wanted.base_model), whole(4), dtype=torch.float32, device=CPU)
    tallies = loop.train(Pipeline(stage, wanted), wanted, Corpus(rows(wanted), ()), None, Reporter())
    return [tally.loss for tally in tallies]


def train(rank: int, wanted: FinetuneRecipe, folder: Path, cut_off: int) -> list[float]:
    """Train as a worker does, cut off at a step (0: never), from the newest checkpoint; returns the losses of the steps taken."""
    spec = JobSpec(
        id="job", created="", version="", recipe=wanted.model_dump(mode="json"), layers=4, master_addr="127.0.0.1",
        embedded=True, strategy=wanted.strategy,
        ranks=tuple(RankSpec(rank=number, node=f"n{number}", start=0, end=4) for number in range(2)),
    )  # fmt: skip
    strategy = loop.prepare(wanted, spec, rank, CPU)
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, settings=SETTINGS)
    found = checkpoints.newest()
    if found is not None:
        strategy.load_state(checkpoints.load(found))
    corpus = Corpus(rows(wanted), ())
    reporter = CutOff(cut_off) if cut_off else Reporter()
    done = found.step if found else 0
    try:
        tallies = loop.train(strategy, wanted, corpus, None, reporter, checkpoints=checkpoints, done=done)
    except KeyboardInterrupt:
        return []
    folder.mkdir(exist_ok=True)
    strategy.save(adapter=folder / "adapter", model=folder / "model", tokenizer=models.tokenizer())
    return [tally.loss for tally in tallies]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("strategy", "architecture", "adapter"),
    [
        ("ddp", "llama", "lora"),
        ("ddp", "qwen3-moe", "lora"),
        ("ddp", "llama", "qlora"),
        ("ddp", "qwen3-moe", "qlora"),
        ("ddp", "llama", "full"),
        ("fsdp2", "llama", "lora"),
        ("fsdp2", "qwen3-moe", "lora"),
        ("fsdp2", "llama", "full"),
    ],
)
def test_two_ranks_learn_what_one_process_learns_even_when_cut_off(
    strategy: str, architecture: str, adapter: str, tmp_path: Path
) -> None:
    base = models.make(tmp_path / "base", architecture)
    rate = 1e-3 if adapter == "full" else 5e-3
    wanted = recipe(base, adapter=adapter, strategy=strategy, learning_rate=rate, save_steps=4)
    history, weights = one_process(wanted)
    assert run_ranks(train, wanted, tmp_path / "cut", 10, seconds=200) == [[], []]
    resumed, same = run_ranks(train, wanted, tmp_path / "cut", 0, seconds=200)
    assert resumed == same
    assert len(resumed) == STEPS - 8
    for loss, (expected, _) in zip(resumed, history[8:], strict=True):
        assert abs(loss - expected) <= TOLERANCE
    if adapter == "full":
        found = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "model").named_parameters())
    else:
        base_model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        found = dict(PeftModel.from_pretrained(base_model, tmp_path / "cut" / "adapter").named_parameters())
    for name, weight in weights.items():
        assert (found[name] - weight).abs().max() <= TOLERANCE, name


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_packed_rows_are_learned_as_one_process_learns_them(strategy: str, tmp_path: Path) -> None:
    base = models.make(tmp_path / "base")
    wanted = recipe(base, strategy=strategy, sample_packing=True, max_steps=6)
    assert len(rows(wanted)) < len(uneven_samples())
    ours = run_ranks(train, wanted, tmp_path / "job", 0, seconds=200)
    assert ours[0] == ours[1]
    assert ours[0] == pytest.approx(run_ranks(alone, wanted, world=1, seconds=200)[0], abs=TOLERANCE)
