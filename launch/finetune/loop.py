"""The loop of a fine-tune: data, schedule, metrics, evaluation, result.

It drives a strategy and knows nothing of how that splits the model.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from cluster.errors import FailedError
from launch import group
from launch.agent.report import Report, Reporter
from launch.chat import Sample
from launch.finetune import card, data, optimizers, packing, schedule, vitals
from launch.finetune.checkpoint import Checkpoints, Found
from launch.finetune.metrics import MetricsLog, StepMetrics
from launch.finetune.pipeline import Pipeline
from launch.finetune.strategy import Strategy, Tally
from launch.job import JobFolder, JobSpec, home
from launch.recipe import FinetuneRecipe, parse_dump
from launch.shard.stage import Stage

# A loss explodes that is so far above the mean of this many steps before it: what guessing costs in the largest vocabularies
# (ln of 160,000 is 12), and thrice that mean.
RECENT = 10
GUESSING = 12.0


def run(folder: JobFolder, spec: JobSpec, rank: int, device: torch.device, reporter: Reporter) -> None:
    """Train as the recipe says, from the checkpoint that it names if any, and save the result."""
    recipe = parse_dump(spec.recipe_at(rank))
    assert isinstance(recipe, FinetuneRecipe)
    tokenizer = AutoTokenizer.from_pretrained(Path(recipe.base_model), trust_remote_code=False)
    corpus = data.load(recipe, tokenizer, home() / "tokens")
    strategy = prepare(recipe, spec, rank, device)
    if rank == 0:
        _print_summary(corpus)
    place = Path(recipe.output_dir) if recipe.output_dir else folder.path
    checkpoints = Checkpoints(
        place / "checkpoints", keep=recipe.save_total_limit, settings=_settings(recipe, spec, corpus)
    )
    found = _found(recipe, checkpoints)
    if found is not None:
        strategy.load_state(checkpoints.load(found))
    if rank == 0:
        _print_resumed(recipe, found)
    reporter.tell(Report("running"))
    reporter.listen_for_stop()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(MetricsLog(folder, after=found.step if found else 0)) if rank == 0 else None
        try:
            train(strategy, recipe, corpus, log, reporter, checkpoints=checkpoints, done=found.step if found else 0)
        except StoppedError as stopped:
            print(stopped, flush=True)  # noqa: T201 - the rank's log
            return
    reporter.rest("saving the result")
    place.mkdir(parents=True, exist_ok=True)
    where = strategy.save(adapter=place / "adapter", model=place / "model", tokenizer=tokenizer)
    if rank == 0:
        card.write(where, spec, recipe, folder.metrics, samples=len(corpus.train), held_out=len(corpus.validation))
    if place != folder.path and rank == 0:  # where `ask` looks for it
        (folder.path / where.name).symlink_to(where)
    if rank == 0:
        print(f"saved {where}")  # noqa: T201 - the rank's log


def prepare(recipe: FinetuneRecipe, spec: JobSpec, rank: int, device: torch.device) -> Strategy:
    """The strategy that the plan chose, with its part of the model loaded."""
    sixteen = _bfloat16(recipe, device)
    # Frozen weights can be 16-bit; weights that are trained stay 32-bit and only compute in 16, or small steps would be
    # rounded away.
    dtype = torch.bfloat16 if sixteen and recipe.adapter != "full" else torch.float32
    autocast = torch.bfloat16 if sixteen else None
    optimizers.check(recipe, spec.strategy)
    if spec.strategy == "fsdp2":
        from launch.finetune.fsdp2 import Fsdp2

        return Fsdp2(recipe, layers=spec.layers, dtype=dtype, device=device, autocast=autocast)
    stage = Stage.load(
        Path(recipe.base_model),
        spec.cut(rank),
        dtype=dtype,
        device=device,
        quantization="nf4" if recipe.adapter == "qlora" else None,
        quantize_experts=recipe.quantize_moe_experts,
    )
    stage.model.train()  # before anything runs: in eval mode bitsandbytes repacks 4-bit weights on a CPU, and then trains wrong
    if recipe.sample_packing:
        packing.check(stage, recipe.name)
    if spec.strategy == "ddp":
        from launch.finetune.ddp import Ddp

        return Ddp(stage, recipe, autocast=autocast)
    return Pipeline(stage, recipe, autocast=autocast)


def train(
    strategy: Strategy,
    recipe: FinetuneRecipe,
    corpus: data.Corpus,
    log: MetricsLog | None,
    reporter: Reporter,
    *,
    checkpoints: Checkpoints | None = None,
    done: int = 0,
) -> list[Tally]:
    """Take every optimizer step after the first `done`; returns what each came to.

    Raises:
        FailedError: the loss explodes or is no number any more, or a checkpoint cannot be written.
        StoppedError: it was asked to stop, and has written a checkpoint.
    """
    per_epoch = data.steps_per_epoch(len(corpus.train), recipe.micro_batch_size * recipe.gradient_accumulation_steps)
    total = recipe.max_steps or max(1, round(per_epoch * recipe.num_epochs))
    tallies: list[Tally] = []
    window = _Window()
    for step, batch in zip(count(done + 1), _batches(strategy, recipe, corpus.train, total, done), strict=False):
        rate = schedule.learning_rate(
            step - 1, total=total, peak=recipe.learning_rate, warmup_ratio=recipe.warmup_ratio, kind=recipe.lr_scheduler
        )
        tally = strategy.step(batch)
        _stop_if_lost(tally, tallies, step, checkpoints)
        norm = strategy.update(rate, recipe.max_grad_norm)
        tallies.append(tally)
        window.add(tally, sum(m.learned for m in batch), sum(m.tokens for m in batch))
        reporter.tell(Report("step", step=step))
        if step % recipe.logging_steps == 0 or step in (1, total):
            waiting = strategy.waiting if isinstance(strategy, Pipeline) else None
            made = window.metrics(step, total, step / per_epoch, norm, rate)
            told = vitals.exchange(waiting, window.elapsed, strategy.device)
            if log is not None:
                log.log(replace(made, busy=told.busy, memory=told.memory))
        if corpus.validation and (step % (recipe.eval_steps or per_epoch) == 0 or step == total):
            reporter.rest("an evaluation")
            _evaluate(strategy, recipe, corpus.validation, step, log)
        stops = step < total and group.stops_after(step, asked=reporter.stop_asked)
        if checkpoints is not None and step < total and (stops or step % (recipe.save_steps or per_epoch) == 0):
            reporter.rest("a checkpoint")
            checkpoints.save(step, strategy.state())
        if stops:
            raise StoppedError(f"stopped after step {step}")
    return tallies


class StoppedError(Exception):
    """Somebody has asked for the end, and the ranks have agreed on this step."""


def _stop_if_lost(tally: Tally, before: list[Tally], step: int, checkpoints: Checkpoints | None) -> None:
    recent = [one.loss for one in before[-RECENT:]]
    exploded = len(recent) == RECENT and tally.loss > GUESSING + 3 * sum(recent) / RECENT
    if math.isfinite(tally.loss) and not exploded:
        return
    good = checkpoints.last() if checkpoints is not None else None
    raise FailedError(
        f"step {step}: the loss is {tally.loss:.4g}"
        + (f", after {sum(recent) / RECENT:.4g} in the steps before" if exploded else "")
        + ": nothing that could be learned from is left",
        "lower `learning_rate`, or look for broken rows in the dataset"
        + (f"; the last good checkpoint is {good}" if good else ""),
    )


def _settings(recipe: FinetuneRecipe, spec: JobSpec, corpus: data.Corpus) -> dict[str, Any]:
    """What must be equal for a run to go on where another stopped, and the rest of its data to be the same."""
    keys = (
        "adapter", "lora_r", "lora_alpha", "lora_target_modules", "optimizer", "seed", "sequence_len", "sample_packing",
        "micro_batch_size", "gradient_accumulation_steps", "val_set_size",
    )  # fmt: skip
    cuts = [[rank.start, rank.end] for rank in spec.ranks]
    dump = recipe.model_dump(mode="json")
    return {
        "base_model": Path(str(spec.recipe["base_model"])).name,
        "strategy": spec.strategy,
        "layers": cuts,
        "samples": len(corpus.train),
        **{key: dump[key] for key in keys},
    }


def _found(recipe: FinetuneRecipe, checkpoints: Checkpoints) -> Found | None:
    """Where to go on from: what the recipe names; or, when it says auto or the agent starts the job again, the newest."""
    wanted = recipe.resume_from_checkpoint
    if wanted is not None and wanted != "auto":
        return checkpoints.at(Path(wanted))
    again = int(os.environ.get("SPARKCTL_ATTEMPT", "1")) > 1
    return checkpoints.newest() if wanted == "auto" or again else None


def _print_resumed(recipe: FinetuneRecipe, found: Found | None) -> None:
    if found is None:
        if recipe.resume_from_checkpoint is not None:
            print("no complete checkpoint yet: starting from the beginning", flush=True)  # noqa: T201
        return
    for reason in found.skipped:
        print(f"passed over {reason}", flush=True)  # noqa: T201
    print(f"going on from {found.path}, after step {found.step}", flush=True)  # noqa: T201


class _Window:
    """Sums since the last logged step."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self.elapsed = 0.0  # of the last window that was logged
        self._reset()

    def _reset(self) -> None:
        self.loss = self.correct = 0.0
        self.learned = self.tokens = 0
        self.since = time.monotonic()

    def add(self, tally: Tally, learned: int, tokens: int) -> None:
        self.loss += tally.loss * learned
        self.correct += tally.accuracy * learned
        self.learned += learned
        self.tokens += tokens

    def metrics(self, step: int, total: int, epoch: float, norm: float, rate: float) -> StepMetrics:
        now = time.monotonic()
        self.elapsed = now - self.since
        made = StepMetrics(
            step=step,
            total_steps=total,
            epoch=round(epoch, 4),
            loss=self.loss / self.learned,
            grad_norm=norm,
            learning_rate=rate,
            token_accuracy=self.correct / self.learned,
            tokens_per_s=self.tokens / self.elapsed,
            seconds=round(now - self._begun, 3),
        )
        self._reset()
        return made


def _batches(
    strategy: Strategy, recipe: FinetuneRecipe, samples: Sequence[Sample], total: int, done: int
) -> Iterator[list[data.MicroBatch]]:
    for step in data.steps(
        samples,
        rows_each=recipe.micro_batch_size,
        micro_batches=recipe.gradient_accumulation_steps,
        seed=recipe.seed,
        total=total,
        done=done,
    ):
        yield [data.collate(chunk, strategy.device, longest=recipe.sequence_len) for chunk in step]


def _evaluate(
    strategy: Strategy, recipe: FinetuneRecipe, samples: Sequence[Sample], step: int, log: MetricsLog | None
) -> None:
    batch = [
        data.collate(chunk, strategy.device, longest=recipe.sequence_len)
        for chunk in data.chunks(samples, recipe.micro_batch_size)
    ]
    tally = strategy.evaluate(batch)
    if log is not None:
        log.log_evaluation(step, tally.loss, tally.accuracy)


def _bfloat16(recipe: FinetuneRecipe, device: torch.device) -> bool:
    if recipe.bf16 == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return bool(recipe.bf16)


def _print_summary(corpus: data.Corpus) -> None:
    counts = corpus.counts
    shortened = f", {counts.shortened} shortened" if counts.shortened else ""
    dropped = f", {counts.dropped} dropped" if counts.dropped else ""
    reused = ", from the cache of tokens" if corpus.reused else ""
    what = "rows of packed samples" if corpus.train[0].positions else "samples"
    rows = f"{len(corpus.train)} {what} to train on, {len(corpus.validation)} held out"
    print(f"{rows}{shortened}{dropped}{reused}", flush=True)  # noqa: T201
    if counts.bad:
        left_out = f"{counts.bad} bad row{'s' * (counts.bad != 1)} left out"
        print(f"{left_out}; the first: {counts.first_bad}", flush=True)  # noqa: T201
