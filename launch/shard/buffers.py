"""Memory that sends and receives take turns with, so that a steady flow of tensors allocates none."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist


class Ring:
    """Buffers of one device in a row. Each holds a tensor of any shape and type, and has grown to the largest it has held.

    Args:
        count: how many tensors are in use at once: a buffer is lent anew when so many others were lent after it.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._bytes = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(count)]
        self._works: list[dist.Work | None] = [None] * count
        self._next = 0

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next buffer as an uninitialised tensor of this shape and type; waits until its last send has left."""
        index, self._next = self._next, (self._next + 1) % len(self._bytes)
        work, self._works[index] = self._works[index], None
        if work is not None:
            work.wait()
        needed = math.prod(shape) * dtype.itemsize
        if self._bytes[index].numel() < needed:
            size = 1 << (needed - 1).bit_length()  # in powers of two, so that growing ends soon
            self._bytes[index] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._bytes[index][:needed].view(dtype).view(shape)

    def leaves_with(self, work: dist.Work) -> None:
        """The buffer that was lent last is being sent."""
        self._works[self._next - 1] = work

    def flush(self) -> None:
        """Wait until every send has left."""
        for index, work in enumerate(self._works):
            if work is not None:
                work.wait()
                self._works[index] = None

    @property
    def addresses(self) -> list[int]:
        """Where the buffers lie, as numbers that change when one grows."""
        return [held.data_ptr() for held in self._bytes]
