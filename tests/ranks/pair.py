"""`run_ranks(body, *args)` runs `body(rank, *args)` on each of two ranks and returns what they return."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.ranks.preload"])


def run_ranks(body: Callable[..., Any], *args: Any, world: int = 2, seconds: float = 90) -> list[Any]:
    """Run `body(rank, *args)` on every rank of a fresh gloo group; the first failure is raised here, and no rank is left behind."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_server.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            _server.Process(
                target=_rank, args=(rank, world, f"{folder}/store", pipes[rank][1], body, args), daemon=True
            )
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes], time.monotonic() + seconds)
        finally:
            for rank in ranks:
                rank.join(5)
                if rank.is_alive():
                    rank.kill()
                    rank.join()


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        open_ones = [receiver for number, receiver in enumerate(receivers) if number not in results]
        ready = multiprocessing.connection.wait(open_ones, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(range(len(receivers))) - set(results))} did not finish in time")
        for receiver in ready:
            number = receivers.index(receiver)  # type: ignore[arg-type]
            failed, value = receiver.recv()  # type: ignore[union-attr]
            if failed:
                raise AssertionError(f"rank {number} failed:\n{value}")
            results[number] = value
    return [results[number] for number in range(len(receivers))]


def _rank(
    rank: int, world: int, store: str, sender: Connection, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        if world > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{Path(store)}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
            )
        value = body(rank, *args)
        if world > 1:
            dist.barrier()
        sender.send((False, value))
    except BaseException:
        sender.send((True, traceback.format_exc()))
