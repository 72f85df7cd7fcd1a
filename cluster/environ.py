"""The environment of each rank: rendered, never inherited by accident. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.inventory import is_secret

if TYPE_CHECKING:  # whoever only reads a record needs no facts
    from cluster.facts import Facts
    from cluster.link import End, LinkPlan

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


@dataclass(frozen=True)
class Variable:
    """One variable of a rank's environment, and why it has its value."""

    name: str
    value: str
    why: str


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
        **as_mapping(_EVERY_RANK),
    }


_EVERY_RANK = (
    Variable("HF_HUB_OFFLINE", "1", "nothing is fetched once the model is placed"),
    Variable("HF_HUB_DISABLE_TELEMETRY", "1", "nothing is told to anyone"),
    Variable("HF_HUB_DISABLE_PROGRESS_BARS", "1", "bars make no sense in a log"),
    Variable(
        "HF_DEACTIVATE_ASYNC_LOAD",
        "1",
        "the parallel loader holds 1.6 times a mixture-of-experts' bytes, the plain one 1.2",
    ),
    Variable("TOKENIZERS_PARALLELISM", "false", "forks after the first use would only warn"),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "unified memory: what fragments is lost to the whole box"
    ),
    Variable("PYTHONUNBUFFERED", "1", "a log shows the last thing that a rank did"),
)


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


def fabric(plan: LinkPlan, nodes: tuple[Facts, Facts], *, rank: int, port: int) -> tuple[Variable, ...]:
    """What a rank of two real nodes gets, one rank a node: torchrun's variables and the link's, in the names of its own node.

    The values are facts/dgx-spark.md's table. NCCL_IB_GID_INDEX stays unset: one number for both devices, while the right
    row differs between them and drifts; NCCL finds it by version and family of address.

    Args:
        nodes: the facts of the head and of the peer.
        port: where rank 0's store listens on the head's address of rail 0.
    """
    ends = plan.ends(rank)
    first = ends[0].interface
    both = ",".join(end.interface for end in ends)
    gpus = all(facts.has_cuda for facts in nodes)
    cores = nodes[rank].cores
    return (
        *_torchrun(rank, plan.rails[0].head, port),
        Variable(
            "OMP_NUM_THREADS", str(cores if isinstance(cores, int) else 1), "the node's cores; a node has one rank"
        ),
        Variable("OMP_WAIT_POLICY", "PASSIVE", "waiting threads sleep: by default they spin, and slow down all else"),
        Variable("NCCL_NET", "IB", "fail rather than fall back to sockets"),
        Variable("NCCL_IB_DISABLE", "0", "RDMA, whatever a shell profile says"),
        Variable(
            "NCCL_IB_HCA", ",".join(end.hca for end in ends), "both twins' RoCE devices: one alone gives half the speed"
        ),
        Variable(
            "NCCL_IB_ROCE_VERSION_NUM", "2", "with the family of address, finds the row of the GID table by itself"
        ),
        Variable("NCCL_IB_ADDR_FAMILY", "AF_INET", "the rails have IPv4 addresses"),
        *_routing(nodes),
        Variable("NCCL_CROSS_NIC", "1", "a ring may go out by one twin and come in by the other"),
        Variable("NCCL_IGNORE_CPU_AFFINITY", "1", "one rank has all cores"),
        Variable("NCCL_NVLS_ENABLE", "0", "a box has one GPU and no NVLink switch"),
        Variable("NCCL_CUMEM_ENABLE", "0", "unified memory"),
        *(Variable(name, first, "bootstrap goes over rail 0, not over the management network") for name in _FIRST_RAIL),
        Variable(
            "GLOO_SOCKET_IFNAME",
            first if gpus else both,
            "gloo only sets up: rail 0" if gpus else "no GPU, so gloo carries the tensors: striped over both rails",
        ),
        *_EVERY_RANK,
    )


_FIRST_RAIL = ("NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "UCX_NET_DEVICES", "OMPI_MCA_btl_tcp_if_include")


def _torchrun(rank: int, head: End, port: int) -> tuple[Variable, ...]:
    why = "as torchrun sets it: two nodes with one rank each"
    numbers = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
    return (
        *(Variable(name, str(value), why) for name, value in numbers.items()),
        Variable(
            "MASTER_ADDR", str(head.address.ip), f"{head.node}'s address on rail 0: an address needs no name server"
        ),
        Variable("MASTER_PORT", str(port), "where rank 0's store listens"),
    )


def _routing(nodes: tuple[Facts, Facts]) -> tuple[Variable, ...]:
    from cluster.readings.box import version_numbers

    # NCCL 2.30 brought it (NVIDIA's set-up script sets it): each rail talks to its counterpart on the same subnet.
    versions = [version_numbers(facts.nccl or "") for facts in nodes]
    if not all(version is not None and version >= (2, 30) for version in versions):
        return ()
    return (
        Variable(
            "NCCL_IB_SUBNET_AWARE_ROUTING", "1", "NCCL 2.30 or later on both nodes: each rail keeps to its subnet"
        ),
    )


def as_mapping(variables: Iterable[Variable]) -> dict[str, str]:
    """The variables as a process takes them."""
    return {variable.name: variable.value for variable in variables}


def shown(variables: Iterable[Variable], own: Mapping[str, str]) -> tuple[Variable, ...]:
    """What a rank really gets, after the inventory's `env` (`own`), which wins; the values of its secrets are left out."""
    theirs = {
        name: Variable(name, "(secret)" if is_secret(name) else value, "the inventory's `env`")
        for name, value in own.items()
        if not _NOT_GIVEN.fullmatch(name)
    }
    return tuple(({variable.name: variable for variable in variables} | theirs).values())


def as_text(variables: Iterable[Variable]) -> str:
    """One line a variable, `NAME=value  # why`, which a shell can read: what `status --env` prints of `shown`."""
    pairs = [(f"{one.name}={shlex.quote(one.value)}", one.why) for one in variables]
    width = max((len(setting) for setting, _ in pairs), default=0)
    return "".join(f"{setting:<{width}}  # {why}\n" for setting, why in pairs)
