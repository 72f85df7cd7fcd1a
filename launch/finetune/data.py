"""Samples into steps of micro-batches, the same on every rank: nothing about the data crosses the link."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.errors import WrongInputError
from launch import rows
from launch.chat import IGNORED, Sample, encode_row
from launch.finetune import packing
from launch.recipe import FinetuneRecipe

# Lengths are padded to a multiple of this, which the GPU's matrix units like and which keeps the number of shapes small.
PAD_TO = 8


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes. `labels` are already shifted: labels[:, t] is what position t should predict.

    Shapes: input_ids, labels and position_ids are int64 [rows, tokens]. Padding stands on the right, where causal attention
    keeps it from being seen, so no mask is needed.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    learned: int
    tokens: int


@dataclass(frozen=True)
class Corpus:
    """The samples of a recipe, split."""

    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    shortened: int
    dropped: int


def load(recipe: FinetuneRecipe, tokenizer: Any) -> Corpus:
    """Read, tokenise and split the datasets of `recipe`.

    Samples longer than `sequence_len` are shortened; those with nothing left to learn are dropped. Both are counted.

    Raises:
        WrongInputError: a bad row (file and line named), or no sample is left.
    """
    samples: list[Sample] = []
    shortened = dropped = 0
    for dataset in recipe.datasets:
        for row in rows.read(Path(dataset.path), dataset.type):
            sample = encode_row(tokenizer, row)
            if len(sample.ids) > recipe.sequence_len:
                shortened += 1
                sample = Sample(sample.ids[: recipe.sequence_len], sample.labels[: recipe.sequence_len])
            if sample.learned:
                samples.append(sample)
            else:
                dropped += 1
    held_out = _validation_size(recipe.val_set_size, len(samples))
    if len(samples) - held_out < 1:
        raise WrongInputError(
            f"no sample is left to train on ({len(samples)} usable, {held_out} held out, {dropped} with nothing to learn)",
            "check `sequence_len`, `val_set_size` and the dataset's answers",
        )
    random.Random(recipe.seed).shuffle(samples)  # noqa: S311 - reproducible, not secret
    train, validation = samples[held_out:], samples[:held_out]
    if recipe.sample_packing:
        train = packed(train, seed=recipe.seed, longest=recipe.sequence_len)
    return Corpus(tuple(train), tuple(validation), shortened, dropped)


def _validation_size(val_set_size: float, samples: int) -> int:
    return math.floor(val_set_size * samples) if val_set_size < 1 else int(val_set_size)


def steps_per_epoch(samples: int, per_step: int) -> int:
    """Optimizer steps in one pass; the last may be smaller."""
    return math.ceil(samples / per_step)


def packed(samples: Sequence[Sample], *, seed: int, longest: int) -> list[Sample]:
    """The samples of several to a row, the same rows in every epoch; a row is a sample that holds several."""
    order = list(range(len(samples)))
    random.Random(f"{seed}/rows").shuffle(order)  # noqa: S311 - reproducible, not secret
    dealt = packing.pack([len(sample.ids) for sample in samples], order, longest)
    return [packing.join([samples[index] for index in row]) for row in dealt]


def steps(
    samples: Sequence[Sample], *, rows_each: int, micro_batches: int, seed: int, total: int, done: int = 0
) -> Iterator[list[list[Sample]]]:
    """Yield `total` steps but the first `done`, each a list of up to `micro_batches` micro-batches of up to `rows_each` samples.

    Every epoch has an order of its own, drawn from `seed`. Within a step samples of like length share a micro-batch, which
    saves padding and changes nothing: a step's gradient is that of all its tokens together.
    """
    per_step = rows_each * micro_batches
    epoch, skipped = divmod(done, steps_per_epoch(len(samples), per_step))
    while done < total:
        order = list(range(len(samples)))
        random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 - reproducible, not secret
        for start in range(skipped * per_step, len(order), per_step):
            if done == total:
                return
            taken = [samples[index] for index in order[start : start + per_step]]
            yield chunks(sorted(taken, key=lambda sample: len(sample.ids)), rows_each)
            done += 1
        epoch, skipped = epoch + 1, 0


def chunks(samples: Sequence[Sample], rows_each: int) -> list[list[Sample]]:
    """Consecutive micro-batches of up to `rows_each` samples."""
    return [list(samples[start : start + rows_each]) for start in range(0, len(samples), rows_each)]


def collate(samples: Iterable[Sample], device: torch.device, *, longest: int) -> MicroBatch:
    """Pad samples to one length, a multiple of PAD_TO but at most `longest`, and shift their labels."""
    samples = list(samples)
    longest_here = max(len(sample.ids) for sample in samples)
    length = max(longest_here, min(longest, math.ceil(longest_here / PAD_TO) * PAD_TO))
    input_ids = torch.zeros(len(samples), length, dtype=torch.int64)
    labels = torch.full((len(samples), length), IGNORED, dtype=torch.int64)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        labels[row, : len(sample.ids) - 1] = torch.tensor(sample.labels[1:])
    positions = torch.arange(length).repeat(len(samples), 1)
    for row, sample in enumerate(samples):
        if sample.positions:
            positions[row, : len(sample.ids)] = torch.tensor(sample.positions)
            positions[row, len(sample.ids) :] -= len(sample.ids)  # padding is a sample of its own
    return MicroBatch(
        input_ids=input_ids.to(device),
        labels=labels.to(device),
        position_ids=positions.to(device),
        learned=sum(sample.learned for sample in samples),
        tokens=sum(len(sample.ids) for sample in samples),
    )
