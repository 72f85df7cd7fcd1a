"""What a `kind: command` recipe runs on each side: its argv with the pair's words filled in, maybe in a container. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launch.recipe_schema import CommandRecipe

# What a container needs to use the link as a program beside it does: RDMA pins memory, NCCL shares it (NVIDIA's playbooks).
DOCKER = (
    *("docker", "run", "--rm", "--init", "--network", "host", "--ipc", "host"),
    *("--ulimit", "memlock=-1", "--ulimit", "stack=67108864"),
)
_INFINIBAND, _GPUS = "/dev/infiniband", ("--gpus", "all")


@dataclass(frozen=True)
class Words:
    """What the placeholders of a command stand for on one node. `model` is empty where the recipe has none."""

    node_rank: int
    head_addr: str
    peer_addr: str
    model: str = ""

    def fill(self, text: str) -> str:
        """`text` with {node_rank}, {head_addr}, {peer_addr} and {model} filled in; other braces stay, JSON's for one."""
        given = {
            "node_rank": str(self.node_rank),
            "head_addr": self.head_addr,
            "peer_addr": self.peer_addr,
            "model": self.model,
        }
        return re.sub(r"\{(\w+)\}", lambda found: given.get(found[1], found[0]), text)


def sides(recipe: CommandRecipe) -> tuple[int, ...]:
    """The sides that run something: 0 the head, 1 the peer."""
    return tuple(side for side in (0, 1) if _words(recipe, side))


def _words(recipe: CommandRecipe, side: int) -> tuple[str, ...]:
    return (recipe.command.peer if side else recipe.command.head) or ()


def argv(recipe: CommandRecipe, side: int, words: Words) -> tuple[str, ...]:
    """What a side runs, outside any container."""
    return tuple(words.fill(word) for word in _words(recipe, side))


def in_container(
    image: str,
    program: Sequence[str],
    *,
    name: str,
    variables: Iterable[str],
    folders: Mapping[str, bool],
    has_gpu: bool,
    has_rdma: bool,
) -> tuple[str, ...]:
    """The argv that runs a program in a container of `image`.

    Args:
        variables: the names of those that it gets from our environment: no value stands in the argv.
        folders: what it sees of the node, in the same place, and whether it may write there.
    """
    devices = [*(_GPUS if has_gpu else ()), *(("--device", _INFINIBAND) if has_rdma else ())]
    seen = [
        word
        for folder, writable in folders.items()
        for word in ("--volume", f"{folder}:{folder}{'' if writable else ':ro'}")
    ]
    given = [word for variable in sorted(variables) for word in ("--env", variable)]
    return (*DOCKER, "--name", name, *devices, *seen, *given, image, *program)
