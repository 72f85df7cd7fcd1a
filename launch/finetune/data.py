"""Samples into steps of micro-batches, the same on every rank: nothing about the data crosses the link."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster.errors import WrongInputError
from launch import rows
from launch.chat import IGNORED, Sample, encode_row
from launch.finetune import cache, packing
from launch.finetune.cache import Counts, Samples, Tokens
from launch.recipe import Dataset, FinetuneRecipe

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
    """The samples of a recipe, split. `counts` tells of rows that are no whole sample, `reused` of datasets tokenised before."""

    train: Sequence[Sample]
    validation: Sequence[Sample]
    counts: Counts = field(default_factory=Counts)
    reused: int = 0


class Chosen(Samples):
    """Samples of several datasets in an order: of each, the dataset and the place in it; read when they are asked for."""

    def __init__(self, sets: Sequence[Tokens], order: Sequence[tuple[int, int]]) -> None:
        self._sets, self.order = sets, order

    def __len__(self) -> int:
        return len(self.order)

    def sample(self, index: int) -> Sample:
        """See Samples.sample."""
        one, place = self.order[index]
        return self._sets[one][place]

    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        lengths = [tokens.lengths for tokens in self._sets]
        return [lengths[one][place] for one, place in self.order]


class Packed(Samples):
    """Rows of several samples each, joined as they are asked for; the same rows in every epoch."""

    def __init__(self, samples: Sequence[Sample], dealt: Sequence[Sequence[int]]) -> None:
        self._samples, self._dealt = samples, dealt

    def __len__(self) -> int:
        return len(self._dealt)

    def sample(self, index: int) -> Sample:
        """See Samples.sample."""
        return packing.join([self._samples[sample] for sample in self._dealt[index]])


def load(recipe: FinetuneRecipe, tokenizer: Any, folder: Path | None = None) -> Corpus:
    """Read, tokenise and split the datasets of `recipe`.

    Samples longer than `sequence_len` are shortened; those with nothing left to learn are dropped; with `skip_bad_rows` bad
    rows are left out. All are counted. Rows are held out before weights count, so none is both learned and evaluated.

    Args:
        folder: where tokens are kept from one run to the next (see cache.py); None: they are made each time.

    Raises:
        WrongInputError: a bad row (file and line named), or no sample is left.
    """
    sets: list[Tokens] = []
    reused = 0
    for dataset in recipe.datasets:
        tokens, was_there = _tokens(dataset, recipe, tokenizer, folder)
        sets.append(tokens)
        reused += was_there
    counts = _sum(tokens.counts for tokens in sets)
    order = [(one, place) for one, tokens in enumerate(sets) for place in range(len(tokens))]
    held_out = _validation_size(recipe.val_set_size, len(order))
    if len(order) - held_out < 1:
        bad = f", {counts.bad} bad, the first {counts.first_bad}" if counts.bad else ""
        raise WrongInputError(
            f"no sample is left to train on ({len(order)} usable, {held_out} held out, {counts.dropped} with nothing to learn"
            f"{bad})",
            "check `sequence_len`, `val_set_size` and the dataset's answers",
        )
    random.Random(recipe.seed).shuffle(order)  # noqa: S311 - reproducible, not secret
    validation, learned = order[:held_out], weighted(order[held_out:], [dataset.weight for dataset in recipe.datasets])
    if not learned:
        raise WrongInputError("the datasets' weights leave no sample to train on", "give a larger `datasets[].weight`")
    chosen = Chosen(sets, learned)
    train: Sequence[Sample] = chosen
    if recipe.sample_packing:
        train = packed(chosen, chosen.lengths(), seed=recipe.seed, longest=recipe.sequence_len)
    return Corpus(train, Chosen(sets, validation), counts, reused)


def _tokens(dataset: Dataset, recipe: FinetuneRecipe, tokenizer: Any, folder: Path | None) -> tuple[Tokens, bool]:
    """The tokens of a dataset, and whether an earlier run has made them."""
    make = partial(_tokenise, dataset, recipe, tokenizer)
    if folder is None:
        return make(), False
    try:
        key = cache.key_of(
            dataset,
            base_model=Path(recipe.base_model),
            sequence_len=recipe.sequence_len,
            skip_bad_rows=recipe.skip_bad_rows,
        )
    except OSError:  # what cannot be read is named by who reads its rows
        return make(), False
    return cache.get(folder, key, make)


def _tokenise(dataset: Dataset, recipe: FinetuneRecipe, tokenizer: Any) -> Tokens:
    shortened = dropped = 0
    bad: list[WrongInputError] = []

    def samples() -> Iterator[Sample]:
        nonlocal shortened, dropped
        for row in rows.read(Path(dataset.path), dataset.type, bad.append if recipe.skip_bad_rows else None):
            try:
                sample = encode_row(tokenizer, row)
            except WrongInputError as wrong:
                if not recipe.skip_bad_rows:
                    raise
                bad.append(wrong)
                continue
            if len(sample.ids) > recipe.sequence_len:
                shortened += 1
                sample = Sample(sample.ids[: recipe.sequence_len], sample.labels[: recipe.sequence_len])
            if sample.learned:
                yield sample
            else:
                dropped += 1

    return cache.gather(samples(), lambda: Counts(shortened, dropped, len(bad), bad[0].message if bad else ""))


def _sum(counts: Iterable[Counts]) -> Counts:
    every = list(counts)
    return Counts(
        sum(one.shortened for one in every),
        sum(one.dropped for one in every),
        sum(one.bad for one in every),
        next((one.first_bad for one in every if one.first_bad), ""),
    )


def weighted(order: Sequence[tuple[int, int]], weights: Sequence[float]) -> list[tuple[int, int]]:
    """Each entry as often as its dataset's weight says; of a fraction, the first ones that the order has."""
    if all(weight == 1 for weight in weights):
        return list(order)
    present = Counter(one for one, _ in order)
    extra = {one: round(weight % 1 * present[one]) for one, weight in enumerate(weights)}
    taken: list[tuple[int, int]] = []
    for one, place in order:
        times = int(weights[one]) + (extra[one] > 0)
        extra[one] -= 1
        taken += [(one, place)] * times
    return taken


def _validation_size(val_set_size: float, samples: int) -> int:
    return math.floor(val_set_size * samples) if val_set_size < 1 else int(val_set_size)


def steps_per_epoch(samples: int, per_step: int) -> int:
    """Optimizer steps in one pass; the last may be smaller."""
    return math.ceil(samples / per_step)


def packed(samples: Sequence[Sample], lengths: Sequence[int], *, seed: int, longest: int) -> Packed:
    """The samples of several to a row, the same rows in every epoch; a row is a sample that holds several."""
    order = list(range(len(samples)))
    random.Random(f"{seed}/rows").shuffle(order)  # noqa: S311 - reproducible, not secret
    return Packed(samples, packing.pack(lengths, order, longest))


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
