"""The environment of each rank: rendered, never inherited by accident. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

# What a rank must not see even when the owner's shell has it: the hub's token is for the downloader alone,
# and a foreign rendezvous would send the rank to another job.
_NEVER = re.compile(
    r"^(HF_TOKEN|HUGGING_FACE_HUB_TOKEN|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|TORCHELASTIC_.*|TORCH_NCCL_.*|NCCL_.*|GLOO_.*|SPARKCTL_(ATTEMPT|STORE_FD|REPORT_FD))$"
)


def loopback(interfaces: tuple[str, ...]) -> str:
    """The loopback interface among this machine's, as the kernel names it."""
    return next((name for name in interfaces if re.fullmatch(r"lo\d*", name)), "lo")


def embedded(*, rank: int, world_size: int, cores: int, interfaces: tuple[str, ...], port: int) -> dict[str, str]:
    """What a rank of the embedded pair gets: torchrun's variables, loopback only, and its share of the cores.

    Args:
        cores: how many cores the ranks of this machine share.
        interfaces: the names of this machine's network interfaces.
        port: where rank 0's store listens on the loopback address.
    """
    lo = loopback(interfaces)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": lo,
        "TP_SOCKET_IFNAME": lo,
        "OMP_NUM_THREADS": str(max(1, cores // world_size)),
        **_EVERY_RANK,
    }


# HF_HUB_OFFLINE: nothing is fetched once the model is placed. HF_DEACTIVATE_ASYNC_LOAD: the parallel loader holds 1.6 times a
# mixture-of-experts' bytes, the plain one 1.2 times. TOKENIZERS_PARALLELISM: forks after the first use would only warn.
_EVERY_RANK = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTHONUNBUFFERED": "1",
}


def combine(inherited: Mapping[str, str], rendered: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """A rank's whole environment: the owner's shell less what it must not see, ours, and the inventory's `env`, which wins."""
    return {name: value for name, value in inherited.items() if not _NEVER.match(name)} | dict(rendered) | dict(own)
