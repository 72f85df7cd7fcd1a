"""How each rank fares: the share of its time that it computes, and the memory that it holds. All ranks tell each other."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Vitals:
    """One entry a rank: `busy` from 0 to 1 (empty where a strategy has no stages), `memory` in bytes, the most so far."""

    busy: tuple[float, ...]
    memory: tuple[int, ...]


class Waiting:
    """The time that a stage waits for its neighbours, by the clock of its GPU where it has one."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Something is received into the device's stream: the host of a GPU runs ahead, so only the GPU knows how long it takes."""
        if not self._cuda:
            with self.on_host():
                yield
            return
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """The host waits, with nothing left to do for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        since = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - since

    def take(self) -> float:
        """Seconds since the last call."""
        if self._events:
            torch.cuda.synchronize()
        seconds: float = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


def exchange(waiting: Waiting | None, elapsed: float, device: torch.device) -> Vitals:
    """What every rank tells of itself since the last call, `elapsed` seconds ago. All ranks call this."""
    busy = max(0.0, 1 - waiting.take() / elapsed) if waiting is not None and elapsed > 0 else 0.0
    own = torch.tensor([busy, memory(device)], dtype=torch.float64)
    told = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        told = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(told, own)
    shares = tuple(round(float(one[0]), 4) for one in told) if waiting is not None else ()
    return Vitals(shares, tuple(int(one[1]) for one in told))


def memory(device: torch.device) -> int:
    """The most bytes that this process has held: on its GPU, else at all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
