"""The loop of a fine-tune: data, schedule, metrics, evaluation, result.

It drives a strategy and knows nothing of how that splits the model.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from transformers import AutoTokenizer

from cluster.errors import FailedError
from launch.agent.report import Report, Reporter
from launch.chat import Sample
from launch.finetune import data, schedule
from launch.finetune.metrics import MetricsLog, StepMetrics
from launch.finetune.pipeline import Pipeline, Tally
from launch.job import JobFolder, JobSpec
from launch.recipe import FinetuneRecipe, parse_dump
from launch.shard.stage import Stage


def run(folder: JobFolder, spec: JobSpec, rank: int, device: torch.device, reporter: Reporter) -> None:
    """Train this rank's stage as the recipe says and save the result."""
    recipe = parse_dump(spec.recipe_at(rank))
    assert isinstance(recipe, FinetuneRecipe)
    base = Path(recipe.base_model)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    corpus = data.load(recipe, tokenizer)
    sixteen = _bfloat16(recipe, device)
    # Frozen weights can be 16-bit; weights that are trained stay 32-bit and only compute in 16, or small steps would be
    # rounded away.
    frozen = recipe.adapter != "full"
    dtype = torch.bfloat16 if sixteen and frozen else torch.float32
    stage = Stage.load(base, spec.cut(rank), dtype=dtype, device=device)
    strategy = Pipeline(stage, recipe, autocast=torch.bfloat16 if sixteen else None)
    if rank == 0:
        _print_summary(corpus)
    reporter.tell(Report("running"))
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(MetricsLog(folder)) if rank == 0 else None
        train(strategy, recipe, corpus, log, reporter)
    reporter.rest("saving the result")
    where = strategy.save(adapter=folder.adapter, model=folder.model, tokenizer=tokenizer)
    if rank == 0:
        print(f"saved {where}")  # noqa: T201 - the rank's log


def train(
    strategy: Pipeline, recipe: FinetuneRecipe, corpus: data.Corpus, log: MetricsLog | None, reporter: Reporter
) -> list[Tally]:
    """Take every optimizer step; returns what each came to.

    Raises:
        FailedError: the loss is infinite or no number any more.
    """
    per_epoch = data.steps_per_epoch(len(corpus.train), recipe.micro_batch_size * recipe.gradient_accumulation_steps)
    total = recipe.max_steps or max(1, round(per_epoch * recipe.num_epochs))
    optimizer = torch.optim.AdamW(
        strategy.parameters(),
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
    )
    tallies: list[Tally] = []
    window = _Window()
    for step, batch in zip(count(1), _batches(strategy, recipe, corpus.train, total), strict=False):
        rate = schedule.learning_rate(
            step - 1, total=total, peak=recipe.learning_rate, warmup_ratio=recipe.warmup_ratio, kind=recipe.lr_scheduler
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        tally = strategy.step(batch)
        norm = strategy.clip(recipe.max_grad_norm)
        if not math.isfinite(tally.loss):
            raise FailedError(
                f"step {step}: the loss is {tally.loss}: nothing that could be learned from is left",
                "lower `learning_rate`, or look for broken rows in the dataset",
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tallies.append(tally)
        window.add(tally, sum(m.learned for m in batch), sum(m.tokens for m in batch))
        reporter.tell(Report("step", step=step))
        if log is not None and (step % recipe.logging_steps == 0 or step in (1, total)):
            log.log(window.metrics(step, total, step / per_epoch, norm, rate))
        if corpus.validation and (step % (recipe.eval_steps or per_epoch) == 0 or step == total):
            reporter.rest("an evaluation")
            _evaluate(strategy, recipe, corpus.validation, step, log)
    return tallies


class _Window:
    """Sums since the last logged step."""

    def __init__(self) -> None:
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
        made = StepMetrics(
            step=step,
            total_steps=total,
            epoch=round(epoch, 4),
            loss=self.loss / self.learned,
            grad_norm=norm,
            learning_rate=rate,
            token_accuracy=self.correct / self.learned,
            tokens_per_s=self.tokens / (time.monotonic() - self.since),
        )
        self._reset()
        return made


def _batches(
    strategy: Pipeline, recipe: FinetuneRecipe, samples: Sequence[Sample], total: int
) -> Iterator[list[data.MicroBatch]]:
    for step in data.steps(
        samples,
        rows_each=recipe.micro_batch_size,
        micro_batches=recipe.gradient_accumulation_steps,
        seed=recipe.seed,
        total=total,
    ):
        yield [data.collate(chunk, strategy.stage.device, longest=recipe.sequence_len) for chunk in step]


def _evaluate(
    strategy: Pipeline, recipe: FinetuneRecipe, samples: Sequence[Sample], step: int, log: MetricsLog | None
) -> None:
    batch = [
        data.collate(chunk, strategy.stage.device, longest=recipe.sequence_len)
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
    shortened = f", {corpus.shortened} shortened" if corpus.shortened else ""
    dropped = f", {corpus.dropped} dropped" if corpus.dropped else ""
    print(f"{len(corpus.train)} samples to train on, {len(corpus.validation)} held out{shortened}{dropped}", flush=True)  # noqa: T201
