"""A `kind: command` recipe started on the pair: its job is made of ranks that are programs (launch.program)."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cluster.inventory import Inventory, Node, is_secret
from launch import command, hub, job, reach
from launch.plan import nodes_of
from launch.recipe import CommandRecipe
from launch.spec import JobSpec, RankSpec

if TYPE_CHECKING:
    from cluster.record import PairRecord
    from launch.handle import JobHandle, PairHandle


def places(recipe: CommandRecipe, inventory: Inventory) -> tuple[Node, ...]:
    """The nodes that run something, the head first. On one node alone, that is what the head would run.

    Raises:
        UnfitError: `nodes` names no node of the inventory.
    """
    nodes = nodes_of(recipe, inventory)
    return nodes if len(nodes) == 1 else tuple(nodes[side] for side in command.sides(recipe))


def start(recipe: CommandRecipe, pair: PairHandle, *, version: str, source: str = "") -> JobHandle:
    """Make the job's folder on its nodes and start their agents, which outlive this program.

    Raises:
        RefusedError: the nodes are no pair, or have another version of our code.
        FailedError: a node cannot be reached, or cannot do it; nothing of the job is left then.
    """
    pair.connect()
    pair.refuse_old_code()
    inventory = pair.inventory
    nodes = places(recipe, inventory)
    variables = {**inventory.env, **recipe.env}
    if recipe.model is not None and hub.is_id(recipe.model):  # the program fetches it itself
        variables.setdefault("HF_HUB_OFFLINE", "0")
    hidden = {name: value for name, value in variables.items() if is_secret(name)}
    spec = JobSpec(
        id=job.new_id(recipe.name, {row.id for row in pair.rows()[0]}),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version,
        recipe=recipe.model_dump(mode="json") | {"env": {}},
        layers=0,
        ranks=tuple(
            _rank(recipe, pair.record, inventory, rank, node.name, len(nodes)) for rank, node in enumerate(nodes)
        ),
        master_addr="127.0.0.1",
        embedded=inventory.embedded,
        link=reach.link(inventory, pair.record) if len(nodes) > 1 else None,
        source=source,
        env={name: value for name, value in variables.items() if name not in hidden},
        secrets=tuple(hidden),
    )
    return pair.launch(spec, secrets.token_urlsafe(32), hidden)


def _rank(
    recipe: CommandRecipe, record: PairRecord | None, inventory: Inventory, rank: int, node: str, world: int
) -> RankSpec:
    return RankSpec(
        rank=rank,
        node=node,
        start=0,
        end=0,
        model=recipe.model or "",
        environment=reach.environment(inventory, record, rank, node, world),
    )
