"""One of two ranks that reduce a tensor together, as a job's would: run on a node by the ranks' Python, out of the shipped code.

It answers orders as cluster.stream does. `listen` (rank 0's) gives the port of the store, which listens on the head's address on
the link alone; `reduce` joins and gives what came of it, with the bytes that each interface and each RoCE device has sent for it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from cluster.stream import MARK, counters, reason

WARM_UP = 2  # rounds that are not timed: the first opens the connections
_WORD = 4  # bytes: a RoCE device counts in words of so many
_INFINIBAND = "/sys/class/infiniband"


class Rank:
    """What one rank does for a measurement."""

    def __init__(self) -> None:
        self._listening: socket.socket | None = None

    def listen(self, address: str) -> dict[str, Any]:
        """A port on the head's address on the link, or why there is none."""
        try:
            self._listening = socket.create_server((address, 0))
        except OSError as error:
            return {"port": 0, "error": reason(error)}
        return {"port": self._listening.getsockname()[1], "error": ""}

    def reduce(
        self, environment: dict[str, str], port: int, size: dict[str, int], rounds: int, seconds: float
    ) -> dict[str, Any]:
        """Join the other rank, and sum a tensor over both, `rounds` times.

        Args:
            environment: the rank's, as cluster.environ renders it.
            size: bytes of the tensor, by backend.
            seconds: to wait for the other rank, and for each round.
        """
        os.environ.update(environment)
        import torch
        import torch.distributed as dist
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its __init__ takes it by a star

        rank, limit = int(environment["RANK"]), timedelta(seconds=seconds)
        backend = "nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        descriptor = self._listening.detach() if self._listening else None
        store = TCPStore(
            environment["MASTER_ADDR"],
            port,
            2,
            is_master=descriptor is not None,
            timeout=limit,
            master_listen_fd=descriptor,
        )
        dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
        try:
            tensor = torch.full((size[backend] // 4,), float(rank + 1), device=device)
            dist.all_reduce(tensor)
            right = bool((tensor == 3).all())
            tensor.zero_()  # sums stay what they are, however often they are taken
            for _ in range(WARM_UP):
                dist.all_reduce(tensor)
            before, taken = sent(), _timed(lambda: _rounds(dist.all_reduce, tensor, rounds))
            moved = {name: count - before.get(name, 0) for name, count in sent().items()}
            dist.barrier()  # whoever is done first must not take the store away
        finally:
            dist.destroy_process_group()
        return {"backend": backend, "size": tensor.numel() * 4, "seconds": taken, "right": right, "sent": moved}


def _rounds(all_reduce: Callable[[Any], Any], tensor: Any, rounds: int) -> None:
    for _ in range(rounds):
        all_reduce(tensor)
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()


def _timed(act: Callable[[], None]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def sent(devices: str = _INFINIBAND) -> dict[str, int]:
    """Bytes that each interface has sent, and each RoCE device: what goes by RDMA, the interfaces do not count."""
    found = {name: count[1] for name, count in counters().items()}
    for path in Path(devices).glob("*/ports/1/counters/port_xmit_data"):
        try:
            found[path.parents[3].name] = int(path.read_text()) * _WORD
        except (OSError, ValueError):
            continue
    return found


def main() -> None:
    """Answer orders until there are no more."""
    rank = Rank()
    orders: dict[str, Callable[..., dict[str, Any]]] = {"listen": rank.listen, "reduce": rank.reduce}
    for line in sys.stdin.buffer:
        if not line.strip():
            continue
        try:
            name, arguments = json.loads(line)
            answer: dict[str, Any] = {"done": orders[name](**arguments)}
        except Exception as error:  # noqa: BLE001, RUF100 - whatever it is, whoever gave the order must learn of it
            answer = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        print(f"{MARK}{json.dumps(answer)}", flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
