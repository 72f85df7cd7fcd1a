"""What a job is: written once as it is made, the same on every node, and read by agents and ranks. Holds no secret."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from launch.inference.request import Request
from launch.split import Cut


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class RankSpec(_Frozen):
    """One rank: the node it runs on, the layers it holds, and where on that node lies what it reads.

    Args:
        model: the folder that its stage is loaded from; empty: what the recipe says.
        adapters: the folder of each adapter, by the name that the recipe gives it (`adapter_path` is its own name,
            `adapter_from` the job's).
        datasets: in the recipe's order; empty: what the recipe says.
        memory: bytes that it may take; 0: it is not told.
        needed: bytes that the plan expects it to take.
        environment: rendered for this rank, but for the rendezvous, which each attempt has its own of.
    """

    rank: int
    node: str
    start: int
    end: int
    model: str = ""
    adapters: dict[str, str] = {}
    datasets: tuple[str, ...] = ()
    memory: int = 0
    needed: int = 0
    environment: dict[str, str] = {}


class EndSpec(_Frozen):
    """One end of a rail: an interface of a node, as that names it, and its IPv4 address."""

    interface: str
    address: str


class LinkSpec(_Frozen):
    """How the two nodes of a job reach each other.

    Args:
        rails: the ends of each rail, by node: the head's first.
        management: the address of each node on the management network, the second path of its agent; empty: not known.
        port: the UDP port of the agents, on both nodes.
    """

    rails: tuple[tuple[EndSpec, EndSpec], ...]
    management: tuple[str, str] = ("", "")
    port: int

    def ends(self, side: int) -> tuple[EndSpec, ...]:
        """The ends of all rails at the head (0) or at the peer (1)."""
        return tuple(rail[side] for rail in self.rails)


class JobSpec(_Frozen):
    """All that a node needs to know of a job.

    Args:
        link: None where all ranks are on one node.
        step_seconds: what the plan expects of a step; 0: nothing is known.
        secrets: the names of those of the inventory's variables whose values stand nowhere.
        code, model: what it ran with: see launch.again; empty where that is not known.
    """

    id: str
    created: str
    version: str
    recipe: dict[str, Any]
    layers: int
    ranks: tuple[RankSpec, ...]
    master_addr: str
    embedded: bool
    link: LinkSpec | None = None
    strategy: str = "pipeline"
    step_seconds: float = 0.0
    source: str = ""
    env: dict[str, str] = {}
    secrets: tuple[str, ...] = ()
    code: str = ""
    model: str = ""
    requests: tuple[Request, ...] = ()

    @property
    def world_size(self) -> int:
        """How many ranks the job has."""
        return len(self.ranks)

    def cut(self, rank: int) -> Cut:
        """The layers of one rank."""
        return Cut(self.ranks[rank].start, self.ranks[rank].end, self.layers)

    @property
    def restarts(self) -> int:
        """How many times it is started again after a failure that may pass."""
        return int(self.recipe.get("restart", {}).get("max", 0)) if not self.requests else 0

    @property
    def backoff(self) -> float:
        """Seconds before that."""
        return float(self.recipe.get("restart", {}).get("backoff", 0.0))

    def ranks_of(self, node: str) -> tuple[RankSpec, ...]:
        """The ranks that run on a node."""
        return tuple(rank for rank in self.ranks if rank.node == node)

    def recipe_at(self, rank: int) -> dict[str, Any]:
        """The recipe as one rank is to read it: every path is where the thing lies on its node."""
        local, recipe = self.ranks[rank], dict(self.recipe)
        if local.model:
            recipe["model" if recipe["kind"] == "command" else "base_model"] = local.model
        if recipe.get("adapter_path"):
            recipe["adapter_path"] = local.adapters.get(recipe["adapter_path"], recipe["adapter_path"])
        elif recipe.get("adapter_from"):
            recipe["adapter_path"], recipe["adapter_from"] = local.adapters[recipe["adapter_from"]], None
        if local.datasets:
            recipe["datasets"] = [
                {**dataset, "path": path} for dataset, path in zip(recipe["datasets"], local.datasets, strict=True)
            ]
        return recipe
