"""Recipe, model card and pair into who holds what; or why not. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import RefusedError, WrongInputError
from cluster.inventory import Inventory, Node
from launch.model_card import ModelCard
from launch.recipe import CommandRecipe, FinetuneRecipe, InferenceRecipe, Recipe
from launch.split import Cut, balance, whole

GIB = 2**30


class UnfitError(WrongInputError):
    """A value of the recipe that only the model or the pair shows to be wrong; whoever read the file adds its line."""

    def __init__(self, key: str, problem: str, fix: str) -> None:
        super().__init__(f"{key}: {problem}", fix)
        self.key = key
        self.problem = problem


@dataclass(frozen=True)
class RankPlan:
    """One rank: where it runs and what it holds. `weight_bytes` are bytes as the checkpoint stores them."""

    rank: int
    node: str
    cut: Cut
    weight_bytes: int


@dataclass(frozen=True)
class Plan:
    """Who holds what."""

    strategy: str
    ranks: tuple[RankPlan, ...]


def nodes_of(recipe: Recipe, inventory: Inventory) -> tuple[Node, ...]:
    """The nodes that the recipe runs on, rank 0 first.

    Raises:
        UnfitError: `nodes` names no node of the inventory.
    """
    if recipe.nodes == 2:
        return inventory.nodes
    if recipe.nodes == 1:
        return (inventory.head,)
    for node in inventory.nodes:
        if node.name == recipe.nodes:
            return (node,)
    names = ", ".join(node.name for node in inventory.nodes)
    raise UnfitError("nodes", f"no node is named {recipe.nodes!r}", f"1, 2 or one of: {names}")


def plan(recipe: Recipe, card: ModelCard, inventory: Inventory) -> Plan:
    """Lay the model out over the recipe's nodes.

    Raises:
        UnfitError: the model does not allow what the recipe asks for.
        RefusedError: understood, but not to be had from this version.
    """
    _check_lengths(recipe, card)
    nodes = nodes_of(recipe, inventory)
    cuts = (
        (whole(card.layers),)
        if len(nodes) == 1
        else balance(card.layer_bytes, stages=len(nodes), embedding_cost=card.embedding_bytes, head_cost=card.head_cost)
    )
    ranks = tuple(
        RankPlan(rank, node.name, cut, _weight_bytes(card, cut))
        for rank, (node, cut) in enumerate(zip(nodes, cuts, strict=True))
    )
    return Plan("pipeline", ranks)


def _weight_bytes(card: ModelCard, cut: Cut) -> int:
    total = sum(card.layer_bytes[cut.start : cut.end])
    if cut.first:
        total += card.embedding_bytes
    if cut.last:
        total += card.head_bytes if cut.first else card.head_cost
    return total


def _check_lengths(recipe: Recipe, card: ModelCard) -> None:
    if card.max_positions is None:
        return
    asked = {"sequence_len": recipe.sequence_len} if isinstance(recipe, FinetuneRecipe) else {}
    if isinstance(recipe, InferenceRecipe):
        asked = {"max_model_len": recipe.max_model_len}
    for key, value in asked.items():
        if value > card.max_positions:
            raise UnfitError(
                key,
                f"{value} is longer than the {card.max_positions} positions that {card.folder.name} allows",
                f"set it to at most {card.max_positions}",
            )


def refuse_absent(recipe: Recipe) -> None:
    """Refuse what is part of the recipe's language but not of this version, rather than run something else instead."""
    missing = _missing(recipe)
    if missing is not None:
        what, instead = missing
        raise RefusedError(f"{recipe.name}: {what} is not in this version of sparkctl", instead)


def _missing(recipe: Recipe) -> tuple[str, str] | None:
    if isinstance(recipe, CommandRecipe):
        return "running `kind: command` recipes", "run the command by hand on both nodes"
    if isinstance(recipe, InferenceRecipe):
        absent = [
            (recipe.quantization is not None, "`quantization`", "leave it out"),
            (recipe.adapter_from is not None, "`adapter_from`", "give `adapter_path` the job's adapter/ folder"),
        ]
    else:
        absent = [
            (recipe.strategy not in ("auto", "pipeline"), f"`strategy: {recipe.strategy}`", "use `strategy: pipeline`"),
            (recipe.adapter == "qlora", "`adapter: qlora`", "use `adapter: lora`"),
            (recipe.optimizer != "adamw_torch", f"`optimizer: {recipe.optimizer}`", "use `optimizer: adamw_torch`"),
            (recipe.sample_packing, "`sample_packing`", "set it to false"),
            (recipe.resume_from_checkpoint is not None, "`resume_from_checkpoint`", "leave it out"),
            (recipe.save_steps is not None, "`save_steps`", "leave it out: the result is saved at the end"),
            (recipe.output_dir is not None, "`output_dir`", "leave it out: the result lies in the job's folder"),
            (any(data.split for data in recipe.datasets), "`datasets[].split`", "leave it out: a file is taken whole"),
        ]
    absent.append(("restart" in recipe.model_fields_set, "`restart`", "leave it out: a failed job stays failed"))
    return next(((what, instead) for wrong, what, instead in absent if wrong), None)
