"""The environment of each rank: rendered, never inherited by accident. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cluster.inventory import is_secret

# Names, joined by commas, of the secrets that the inventory's `env` gives: an agent gets them in its own environment, because
# they may stand in no file, and must tell them from what it merely inherited.
SECRETS = "SPARKCTL_SECRETS"

# What is not the inventory's to give: the hub's token is for the downloader alone, the rendezvous differs from rank to rank.
_NOT_GIVEN = re.compile(
    r"HF_TOKEN|HUGGING_FACE_HUB_TOKEN"
    r"|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|TORCHELASTIC_.*"
    r"|SPARKCTL_(ATTEMPT|STORE_FD|REPORT_FD|SECRETS)"
)
# Nor is this inherited from the owner's shell: what was set there for another program would change how the ranks talk.
_NOT_INHERITED = re.compile(r"(TORCH_NCCL|NCCL|GLOO)_.*")


def loopback(interfaces: tuple[str, ...]) -> str:
    """The loopback interface among this machine's, as the kernel names it."""
    return next((name for name in interfaces if re.fullmatch(r"lo\d*", name)), "lo")


def embedded(*, rank: int, world_size: int, cores: int, interfaces: tuple[str, ...], port: int) -> dict[str, str]:
    """What a rank of the embedded pair gets: torchrun's variables, loopback only, and its share of the cores.

    OpenMP's threads sleep while they wait (PASSIVE): by default they spin, and where anything else runs on these cores, as on a
    laptop or in CI, a small model's steps then take ten times as long.

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
        "OMP_WAIT_POLICY": "PASSIVE",
        **_EVERY_RANK,
    }


# HF_HUB_OFFLINE: nothing is fetched once the model is placed. HF_DEACTIVATE_ASYNC_LOAD: the parallel loader holds 1.6 times a
# mixture-of-experts' bytes, the plain one 1.2 times. TOKENIZERS_PARALLELISM: forks after the first use would only warn.
# HF_HUB_DISABLE_PROGRESS_BARS: bars make no sense in a log.
_EVERY_RANK = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTHONUNBUFFERED": "1",
}


def for_agent(inherited: Mapping[str, str], secrets: Mapping[str, str]) -> dict[str, str]:
    """An agent's environment: the owner's shell without its secrets, and the inventory's `secrets`, which are for the ranks."""
    return _without_secrets(inherited) | dict(secrets) | {SECRETS: ",".join(secrets)}


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets that `for_agent` put into an agent's environment."""
    names = environment.get(SECRETS, "").split(",")
    return {name: environment[name] for name in names if name in environment}


def combine(inherited: Mapping[str, str], rendered: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """A rank's whole environment: the owner's shell less what it must not see, ours, and the inventory's `env`, which wins.

    Secrets come from `own` alone, and never the hub's token.
    """
    kept = {name: value for name, value in _without_secrets(inherited).items() if not _NOT_INHERITED.fullmatch(name)}
    given = {name: value for name, value in own.items() if not _NOT_GIVEN.fullmatch(name)}
    return kept | dict(rendered) | given


def _without_secrets(shell: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in shell.items() if not is_secret(name) and not _NOT_GIVEN.fullmatch(name)}
