"""The order of micro-batches is complete, safe and as fast as its formula; rates are those of transformers."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from launch.finetune.schedule import Move, learning_rate, one_forward_one_backward

SHAPES = [(stages, micro_batches) for stages in (1, 2, 3, 4) for micro_batches in (1, 2, 3, 4, 8, 17)]


def _orders(stages: int, micro_batches: int) -> list[list[tuple[Move, int]]]:
    return [
        list(one_forward_one_backward(stage=stage, stages=stages, micro_batches=micro_batches))
        for stage in range(stages)
    ]


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_every_micro_batch_goes_forward_once_and_then_backward_once(stages: int, micro_batches: int) -> None:
    for order in _orders(stages, micro_batches):
        assert len(order) == 2 * micro_batches
        for index in range(micro_batches):
            assert order.index((Move.FORWARD, index)) < order.index((Move.BACKWARD, index))
        for move in Move:  # in one order on all stages: what is sent first is received first
            assert [index for made, index in order if made is move] == list(range(micro_batches))


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_no_stage_holds_more_activations_than_stages_follow_it(stages: int, micro_batches: int) -> None:
    for stage, order in enumerate(_orders(stages, micro_batches)):
        held = most = 0
        for move, _ in order:
            held += 1 if move is Move.FORWARD else -1
            most = max(most, held)
        assert (most, held) == (min(stages - stage, micro_batches), 0)


def _simulated(stages: int, micro_batches: int, *, forward: int, backward: int) -> int:
    """The time all stages take when each does its moves in order as soon as its neighbour has delivered."""
    waiting = [iter(order) for order in _orders(stages, micro_batches)]
    upcoming = [next(order, None) for order in waiting]
    free = [0] * stages
    done: dict[tuple[Move, int, int], int] = {}
    while any(move is not None for move in upcoming):
        progressed = False
        for stage, move in enumerate(upcoming):
            if move is None:
                continue
            kind, index = move
            needs = (kind, index, stage + (-1 if kind is Move.FORWARD else 1))
            if 0 <= needs[2] < stages and needs not in done:
                continue
            starts = max(free[stage], done.get(needs, 0))
            free[stage] = done[kind, index, stage] = starts + (forward if kind is Move.FORWARD else backward)
            upcoming[stage] = next(waiting[stage], None)
            progressed = True
        assert progressed, f"deadlock: every stage waits for another ({upcoming})"
    return max(free)


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
@pytest.mark.parametrize("backward", [1, 2, 3])
def test_stages_never_wait_for_each_other_in_a_circle_and_idle_no_longer_than_the_bubble(
    stages: int, micro_batches: int, backward: int
) -> None:
    taken = _simulated(stages, micro_batches, forward=1, backward=backward)
    alone = stages * micro_batches * (1 + backward)  # one process does all stages' work
    assert taken == (micro_batches + stages - 1) * (1 + backward)
    assert alone / taken == pytest.approx(stages * micro_batches / (micro_batches + stages - 1))


@pytest.mark.parametrize(
    ("kind", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.07, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 100])
def test_rates_are_those_of_transformers_at_every_step(kind: str, theirs: str, warmup_ratio: float, total: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-4)
    warmup = math.ceil(total * warmup_ratio)  # as TrainingArguments.get_warmup_steps
    schedule = transformers.get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        ours = learning_rate(step, total=total, peak=2e-4, warmup_ratio=warmup_ratio, kind=kind)  # type: ignore[arg-type]
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
        optimizer.step()
        schedule.step()
