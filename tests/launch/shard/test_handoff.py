"""Tensors arrive at the neighbour as they left, in both directions at once, however the two take turns."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from launch.shard.handoff import IN_FLIGHT, Handoff
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _numbered(number: int, *shape: int) -> torch.Tensor:
    return torch.full(shape, float(number))


def test_shape_type_and_values_arrive_whatever_the_strides() -> None:
    sent, received = run_ranks(_exchange_kinds)
    assert len(sent) == len(received) == 4
    for left, arrived in zip(sent, received, strict=True):
        assert left == arrived


def _exchange_kinds(rank: int) -> list[Any]:
    handoff = Handoff(CPU)
    base = torch.arange(24).reshape(2, 3, 4)
    kinds = [base.float().transpose(1, 2), base[:, ::2].double(), base.bfloat16() / 7, base]
    if rank == 0:
        for tensor in kinds:
            handoff.send_forward(tensor)
        handoff.flush()
        return [tensor.tolist() for tensor in kinds]
    return [handoff.recv_forward(tuple(tensor.shape), tensor.dtype).tolist() for tensor in kinds]


def test_both_stages_may_send_before_either_receives() -> None:
    forward, backward = run_ranks(_cross)[::-1]
    assert forward == [float(number) for number in range(IN_FLIGHT)]
    assert backward == [-float(number) for number in range(IN_FLIGHT)]


def _cross(rank: int) -> list[float]:
    handoff = Handoff(CPU)
    shape = (64, 1024)  # 256 KB each: more than a socket holds by itself
    send, sign = (handoff.send_forward, 1) if rank == 0 else (handoff.send_backward, -1)
    for number in range(IN_FLIGHT):
        send(_numbered(sign * number, *shape))
    receive = handoff.recv_backward if rank == 0 else handoff.recv_forward
    got = [float(receive(shape, torch.float32).mean()) for _ in range(IN_FLIGHT)]
    handoff.flush()
    return got


def test_groups_are_told_apart_by_their_tags() -> None:
    assert run_ranks(_tagged)[1] == [[2.0, 1.0, 0.0], [12.0, 11.0, 10.0]]


def _tagged(rank: int) -> list[list[float]]:
    handoff = Handoff(CPU)
    if rank == 0:
        for number in (0, 10):
            for tag in range(3):
                handoff.send_forward(_numbered(number + tag, 4), tag=tag)
        handoff.flush()
        return []
    return [[float(handoff.recv_forward((4,), torch.float32, tag=tag)[0]) for tag in (2, 1, 0)] for _ in range(2)]


def test_tokens_return_to_the_first_stage_past_those_between() -> None:
    assert run_ranks(_tokens, world=3)[0] == [[7, 8], [9, 10]]


def _tokens(rank: int) -> list[list[int]]:
    handoff = Handoff(CPU)
    if rank == 0:
        awaited = [handoff.await_tokens(2, tag=tag) for tag in (0, 1)]
        handoff.send_forward(_numbered(1, 4))
        got = []
        for work, buffer in awaited:
            work.wait()
            got.append(buffer.tolist())
        handoff.flush()
        return got
    hidden = handoff.recv_forward((4,), torch.float32)
    if rank == 1:
        handoff.send_forward(hidden + 1)
    else:
        assert hidden.tolist() == [2.0] * 4
        handoff.return_tokens(torch.tensor([9, 10]), tag=1)
        handoff.return_tokens(torch.tensor([7, 8]), tag=0)
    handoff.flush()
    return []


def test_only_so_many_sends_are_held() -> None:
    assert run_ranks(_many)[0] == [IN_FLIGHT, 0]


def _many(rank: int) -> list[int]:
    handoff = Handoff(CPU)
    count = 3 * IN_FLIGHT
    if rank == 0:
        for number in range(count):
            handoff.send_forward(_numbered(number, 8))
        held = len(handoff._sends)
        handoff.flush()
        return [held, len(handoff._sends)]
    assert [float(handoff.recv_forward((8,), torch.float32)[0]) for _ in range(count)] == list(range(count))
    return []


def test_a_rank_alone_has_no_neighbours() -> None:
    assert not dist.is_initialized()
    handoff = Handoff(CPU)
    assert (handoff.rank, handoff.world) == (0, 1)
    handoff.flush()
