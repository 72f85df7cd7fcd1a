"""The process group of a job: joined on the master's address alone, met in without a time limit, left together."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # its __init__ takes them by a star

from cluster.errors import FailedError
from launch.spec import JobSpec

# What finds a hang is the agent; this only ends what it would have missed, and is fixed for the life of the group.
LEAST = timedelta(seconds=60)
STEPS = 10
# Where nothing is known of a step, and where one rank may do a thing alone for long while the others wait: sharding, compiling.
LONG = timedelta(minutes=30)
# Ranks may come, load and save at different times: a large model takes minutes on a slow disk.
MEET_WITHIN = timedelta(hours=2)

# The store, this rank, how many there are, and how often they have met.
_STORE: list[Any] = []


def time_out(spec: JobSpec) -> timedelta:
    """After which an operation of the group is given up."""
    if spec.strategy != "pipeline" or not spec.step_seconds:
        return LONG
    return max(LEAST, timedelta(seconds=STEPS * spec.step_seconds))


def join(spec: JobSpec, rank: int, world: int, device: object) -> None:
    """Join the job's process group.

    The store is made on a socket that is bound to the master address: torchrun's own listens on every interface. Its keys begin
    with the attempt's number, so a rank left over from an earlier attempt cannot join this one.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serve = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listening = _listening_socket(host, port) if serve else None
    store = TCPStore(host, port, world, is_master=serve, timeout=timedelta(minutes=5), master_listen_fd=listening)
    attempt = os.environ.get("SPARKCTL_ATTEMPT", os.environ.get("TORCHELASTIC_RESTART_COUNT", "1"))
    prefixed = PrefixStore(f"attempt-{attempt}", store)
    _STORE[:] = [prefixed, rank, world, 0]
    meet()
    backend = "gloo" if str(device) == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world, timeout=time_out(spec))
    if dist.get_world_size() != spec.world_size:
        raise FailedError(
            f"rank {rank}: joined a world of {dist.get_world_size()} instead of {spec.world_size}", "report this"
        )


def meet() -> None:
    """Wait until every rank is there, however long each takes; nothing where there is no group."""
    if not _STORE:
        return
    store, rank, world, times = _STORE
    _STORE[3] = times + 1
    store.set(f"met-{times}-{rank}", "")
    store.wait([f"met-{times}-{other}" for other in range(world)], MEET_WITHIN)


def stops_after(step: int, *, asked: bool) -> bool:
    """Whether all ranks stop after this step. Each calls it at the end of every step, in which all of them have met.

    Ranks are asked to stop at about the same time, which is not the same step. Rank 0 decides, and names the step after the next:
    none can have come so far before it was named.
    """
    if not _STORE:
        return asked
    store, rank, *_ = _STORE
    if asked and rank == 0 and not store.check(["stop"]):
        store.set("stop", str(step + 2))
    return bool(store.check(["stop"])) and step >= int(store.get("stop"))


def leave() -> None:
    """Leave the group together, so that no rank mistakes the other's orderly end for a failure."""
    if dist.is_initialized():
        meet()
        dist.barrier()
        dist.destroy_process_group()
        _STORE.clear()


def _listening_socket(host: str, port: int) -> int:
    given = os.environ.get("SPARKCTL_STORE_FD")
    return int(given) if given else socket.create_server((host, port)).detach()
