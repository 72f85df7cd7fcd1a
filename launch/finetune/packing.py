"""Several short samples in one row, through which attention never crosses from one to the next. Pure, but for the probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cluster.errors import RefusedError
from launch.chat import IGNORED, Sample
from launch.shard.stage import Stage

# Rows that stay open while samples are dealt out; more fill rows better and spread an epoch's order less evenly.
OPEN = 32


def pack(lengths: Sequence[int], order: Sequence[int], longest: int) -> list[list[int]]:
    """Deal samples out to rows of at most `longest` tokens, first fit among the open rows; returns the samples of each row.

    Rows come in the order in which they were opened, and hold their samples in the order given.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fitting = next((row for row in range(max(0, len(rows) - OPEN), len(rows)) if room[row] >= lengths[index]), None)
        if fitting is None:
            rows.append([])
            room.append(longest)
            fitting = len(rows) - 1
        rows[fitting].append(index)
        room[fitting] -= lengths[index]
    return rows


def join(samples: Sequence[Sample]) -> Sample:
    """One row of several samples: positions begin anew with each, and no sample's end predicts the next one's beginning."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for sample in samples:
        ids += sample.ids
        labels += (IGNORED, *sample.labels[1:])
        positions += range(len(sample.ids))
    return Sample(tuple(ids), tuple(labels), tuple(positions))


@torch.no_grad()
def check(stage: Stage, name: str, forward: Callable[..., torch.Tensor] | None = None) -> None:
    """Make sure, by trying it, that samples in one row do not see each other in this model.

    Attention keeps them apart by their positions; layers that carry a state along the row (linear attention, convolutions) do not.

    Args:
        stage: the loaded model or part of it.
        name: the recipe's, for the message.
        forward: runs the stage, with the arguments of Stage.forward, where it must not be run by itself.

    Raises:
        RefusedError: they see each other.
    """
    generator = torch.Generator().manual_seed(0)
    ends = (9, 16)
    if stage.cut.first:
        vocabulary = int(stage.config.get_text_config(decoder=True).vocab_size)
        row = torch.randint(vocabulary, (1, ends[-1]), generator=generator).to(stage.device)
    else:
        row = torch.randn((1, ends[-1], stage.hidden_size), generator=generator).to(stage.device, stage.dtype)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None].to(stage.device)
    run = forward or stage.forward
    together = run(row, attention_mask=None, position_ids=positions)
    alone = run(row[:, 9:], attention_mask=None, position_ids=positions[:, 9:])
    tolerance = 1e-3 if stage.dtype == torch.float32 else 5e-2
    shown = float(alone.abs().max())
    if not torch.allclose(together[:, 9:].float(), alone.float(), rtol=tolerance, atol=tolerance * shown):
        raise RefusedError(
            f"{name}: `sample_packing`: samples that share a row see each other in {type(stage.model).__name__}",
            "set `sample_packing: false`",
        )
