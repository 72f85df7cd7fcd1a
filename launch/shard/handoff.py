"""Tensors between neighbouring stages: hidden states go forward, gradients and tokens come back.

Each direction has its own communicator, because NCCL works off one communicator's sends and receives strictly in order:
with a single one, two stages that send to each other at the same time would wait for each other for ever.
Nothing is pickled: both ends know shape and dtype.

Gloo picks the interface by the tag (ProcessGroupGloo::getContext: tag modulo the number of interfaces), so tensors that follow one
another under the same tag take turns between two tags: over two rails each carries every other one.
"""

from __future__ import annotations

from collections import Counter, deque
from datetime import timedelta

import torch
import torch.distributed as dist

from launch import group
from launch.agent.report import pulse
from launch.shard.buffers import Ring

# Sends whose buffers are still held; past this the oldest is waited for, which bounds memory.
IN_FLIGHT = 16
RAILS = 2


class Handoff:
    """This rank's two directions. A rank that holds the whole model is `alone`, whatever group it is in: it has no neighbours."""

    def __init__(self, device: torch.device, *, alone: bool = False, timeout: timedelta | None = None) -> None:
        self.device = device
        alone = alone or not dist.is_initialized() or dist.get_world_size() == 1
        self.rank = 0 if alone else dist.get_rank()
        self.world = 1 if alone else dist.get_world_size()
        self._sends: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._turns: Counter[tuple[bool, bool, int, int]] = Counter()
        if not alone:
            group.meet()  # a rank may have loaded for minutes longer than its neighbour
        self._forward = None if alone else dist.new_group(timeout=timeout)
        self._backward = None if alone else dist.new_group(timeout=timeout)

    def send_forward(self, tensor: torch.Tensor, tag: int = 0, ring: Ring | None = None) -> None:
        """Start sending `tensor` to the next stage, from a buffer of `ring` if one is given; returns at once."""
        self._send(tensor, self.rank + 1, self._forward, tag, ring)

    def recv_forward(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        tag: int = 0,
        ring: Ring | None = None,
    ) -> torch.Tensor:
        """Wait for a tensor of the previous stage, which comes into a buffer of `ring` if one is given."""
        return self._recv(shape, dtype, self.rank - 1, self._forward, device, tag, ring)

    def await_forward(
        self, shape: tuple[int, ...], dtype: torch.dtype, tag: int, ring: Ring
    ) -> tuple[dist.Work, torch.Tensor]:
        """Start receiving a tensor of the previous stage; wait on the work, then read the tensor."""
        return self._await(ring.lend(shape, dtype), self.rank - 1, self._forward, tag)

    def send_backward(self, tensor: torch.Tensor, tag: int = 0) -> None:
        """Start sending `tensor` to the previous stage; returns at once."""
        self._send(tensor, self.rank - 1, self._backward, tag)

    def recv_backward(self, shape: tuple[int, ...], dtype: torch.dtype, tag: int = 0) -> torch.Tensor:
        """Wait for a tensor of the next stage."""
        return self._recv(shape, dtype, self.rank + 1, self._backward, None, tag)

    def return_tokens(self, tokens: torch.Tensor, tag: int, ring: Ring | None = None) -> None:
        """On the last stage: start sending sampled token ids, int64 on the CPU, to the first."""
        self._send(tokens, 0, self._backward, tag, ring)

    def await_tokens(self, rows: int, tag: int) -> tuple[dist.Work, torch.Tensor]:
        """On the first stage: start receiving the last stage's token ids; wait on the work, then read the tensor."""
        return self._await(torch.empty(rows, dtype=torch.int64), self.world - 1, self._backward, tag)

    def await_back(
        self, shape: tuple[int, ...], dtype: torch.dtype, tag: int, ring: Ring
    ) -> tuple[dist.Work, torch.Tensor]:
        """As `await_tokens`, for any tensor of the CPU that the last stage returns."""
        return self._await(ring.lend(shape, dtype), self.world - 1, self._backward, tag)

    def flush(self) -> None:
        """Wait until every send has left that was not from a ring."""
        while self._sends:
            self._sends.popleft()[0].wait()

    def _turn(self, group: dist.ProcessGroup | None, peer: int, tag: int, *, out: bool) -> int:
        """The tag that goes over the wire; both ends count alike, for what has one tag arrives in its order."""
        key = (group is self._forward, out, peer, tag)
        self._turns[key] += 1
        return RAILS * tag + self._turns[key] % RAILS

    def _await(
        self, buffer: torch.Tensor, source: int, group: dist.ProcessGroup | None, tag: int
    ) -> tuple[dist.Work, torch.Tensor]:
        work = dist.irecv(buffer, src=source, group=group, tag=self._turn(group, source, tag, out=False))
        assert work is not None
        return work, buffer

    def _send(
        self, tensor: torch.Tensor, to: int, group: dist.ProcessGroup | None, tag: int, ring: Ring | None = None
    ) -> None:
        if ring is None:
            held = tensor.detach().contiguous()
        else:
            held = ring.lend(tuple(tensor.shape), tensor.dtype)
            held.copy_(tensor)
        work = dist.isend(held, dst=to, group=group, tag=self._turn(group, to, tag, out=True))
        pulse()
        assert work is not None
        if ring is not None:
            ring.leaves_with(work)
            return
        self._sends.append((work, held))
        while len(self._sends) > IN_FLIGHT:
            self._sends.popleft()[0].wait()

    def _recv(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        source: int,
        group: dist.ProcessGroup | None,
        device: torch.device | None,
        tag: int,
        ring: Ring | None = None,
    ) -> torch.Tensor:
        buffer = (
            ring.lend(shape, dtype)
            if ring is not None
            else torch.empty(shape, dtype=dtype, device=device or self.device)
        )
        dist.recv(buffer, src=source, group=group, tag=self._turn(group, source, tag, out=False))
        pulse()
        return buffer
