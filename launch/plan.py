"""Recipe, model card and boxes into who holds what, whether that fits, and how fast it will be; or why not. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import RefusedError, WrongInputError
from cluster.inventory import Inventory, Node
from launch import advice, speed, workload
from launch.advice import Way
from launch.box import Box
from launch.capacity import Demand, Memory
from launch.model_card import ModelCard
from launch.precision import Precision
from launch.recipe import CommandRecipe, FinetuneRecipe, InferenceRecipe, Recipe
from launch.speed import Clock, ServingSpeed, TrainingSpeed
from launch.split import Cut, balance, has_room, whole
from launch.strategies import ALL, Choice, Option, choose
from launch.workload import Serving, Training, Workload

GIB = 2**30
# Strategies in which every rank runs the whole model, and among how many it shares out its state.
_SHARDS = {"ddp": 1, "fsdp2": 2, "zero3": 2}


class UnfitError(WrongInputError):
    """A value of the recipe that only the model or the pair shows to be wrong; whoever read the file adds its line."""

    def __init__(self, key: str, problem: str, fix: str) -> None:
        super().__init__(f"{key}: {problem}", fix)
        self.key = key
        self.problem = problem


@dataclass(frozen=True)
class RankPlan:
    """One rank: where it runs, what it holds, and what that takes of what it may use."""

    rank: int
    box: Box
    cut: Cut
    memory: Memory

    @property
    def node(self) -> str:
        """The name of the node that it runs on."""
        return self.box.node

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in its memory."""
        return self.memory.weights

    @property
    def headroom(self) -> int:
        """Bytes left; negative where it does not fit."""
        return self.box.usable - self.memory.total


@dataclass(frozen=True)
class Plan:
    """Who holds what and how fast it will be.

    `ways` change the recipe: where it fits, to the largest that still would; where not, so that it would.
    `speed` is None where nothing is known of the boxes' speeds, `choice` where the recipe left none.
    """

    strategy: str
    work: Workload
    precision: Precision
    ranks: tuple[RankPlan, ...]
    speed: ServingSpeed | TrainingSpeed | None
    ways: tuple[Way, ...]
    assumptions: tuple[str, ...]
    choice: Choice | None = None

    @property
    def fits(self) -> bool:
        """Whether every rank has room for what it must hold."""
        return all(rank.headroom >= 0 for rank in self.ranks)


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


def plan(
    recipe: FinetuneRecipe | InferenceRecipe, card: ModelCard, boxes: Sequence[Box], *, adapter: tuple[int, ...] = ()
) -> Plan:
    """Lay the model out over the boxes, rank 0 first; `adapter` are a served LoRA adapter's elements in each layer.

    Raises:
        UnfitError: the model does not allow what the recipe asks for.
        WrongInputError: it has fewer layers than there are boxes, or its configuration lacks what the plan needs.
    """
    _check_lengths(recipe, card)
    work = workload.of_recipe(recipe, adapter)
    precision = workload.precision(recipe, card, cuda=boxes[0].cuda)
    choice = None
    strategy: str = recipe.strategy if recipe.strategy in _SHARDS and len(boxes) > 1 else "pipeline"
    if isinstance(recipe, FinetuneRecipe) and recipe.strategy == "auto" and len(boxes) > 1:
        choice = _choice(recipe, card, work, precision, boxes)
        strategy = choice.strategy
    ranks = _Layout(card, work, precision, boxes, strategy).ranks()
    fits = all(rank.headroom >= 0 for rank in ranks)

    def would_fit(changed: FinetuneRecipe | InferenceRecipe) -> bool:
        held = workload.precision(changed, card, cuda=boxes[0].cuda)
        return _Layout(card, workload.of_recipe(changed, adapter), held, boxes, strategy).has_room

    return Plan(
        strategy,
        work,
        precision,
        ranks,
        _speed(card, work, precision, ranks, strategy),
        advice.room(recipe, card, would_fit) if fits else advice.ways_out(recipe, would_fit),
        advice.assumptions(card, work, precision, boxes),
        choice,
    )


def _choice(
    recipe: FinetuneRecipe, card: ModelCard, work: Workload, precision: Precision, boxes: Sequence[Box]
) -> Choice:
    options = []
    for name in ALL:
        missing = _missing(recipe.model_copy(update={"strategy": name}))
        ranks = _Layout(card, work, precision, boxes, name).ranks()
        predicted = _speed(card, work, precision, ranks, name)
        step = predicted.step if isinstance(predicted, TrainingSpeed) else None
        options.append(Option(name, missing[0] if missing else "", -min(rank.headroom for rank in ranks), step))
    shared = any(box.ranks > 1 for box in boxes)
    return choose(options, shared=shared, quantized=bool(precision.quantized))


class _Layout:
    """How a piece of work could be laid out over the boxes."""

    def __init__(
        self, card: ModelCard, work: Workload, precision: Precision, boxes: Sequence[Box], strategy: str
    ) -> None:
        self._card, self._work, self._precision, self._boxes = card, work, precision, boxes
        self._shards = _SHARDS.get(strategy)
        self._demand = Demand(card, work, precision, cuda=boxes[0].cuda)

    @property
    def has_room(self) -> bool:
        """Whether there is a way that fits."""
        if self._shards is not None:
            memory = self._demand.whole(shards=self._shards)
            return all(memory.total <= box.usable for box in self._boxes)
        return has_room(self._card.layers, len(self._boxes), self._filled)

    def ranks(self) -> tuple[RankPlan, ...]:
        """The best way: see `balance`."""
        card, boxes = self._card, self._boxes
        if self._shards is not None:
            memory = self._demand.whole(shards=self._shards)
            return tuple(RankPlan(rank, box, whole(card.layers), memory) for rank, box in enumerate(boxes))
        clock = Clock(card, self._precision, boxes[0].speeds or speed.PROPORTIONS)
        cost, head = speed.costs(clock, self._work)
        cuts = balance([cost(part) for part in card.stack], stages=len(boxes), head_cost=head, filled=self._filled)
        return tuple(
            RankPlan(rank, box, cut, self._take(cut, rank))
            for rank, (box, cut) in enumerate(zip(boxes, cuts, strict=True))
        )

    def _take(self, cut: Cut, stage: int) -> Memory:
        # 1F1B: a stage is at most as many micro-batches ahead of its backward pass as there are stages from it on.
        work, stages = self._work, len(self._boxes)
        ahead = min(work.micro_batches, stages - stage) if isinstance(work, Training) else 1
        return self._demand.of(cut, in_flight=ahead, ranks=stages)

    def _filled(self, cut: Cut, stage: int) -> float:
        usable = self._boxes[stage].usable
        return self._take(cut, stage).total / usable if usable else math.inf


def _speed(
    card: ModelCard, work: Workload, precision: Precision, ranks: Sequence[RankPlan], strategy: str
) -> ServingSpeed | TrainingSpeed | None:
    clocks = [Clock(card, precision, rank.box.speeds) for rank in ranks if rank.box.speeds is not None]
    if len(clocks) < len(ranks):
        return None
    cuts = [rank.cut for rank in ranks]
    if isinstance(work, Serving):
        return speed.serving(clocks, cuts, work)
    trained = max(rank.memory.gradients for rank in ranks) // 4
    if strategy == "pipeline":
        return speed.pipeline(clocks, cuts, work, trained)
    everything = sum(precision.size(weight) for part in card.parts for weight in part.weights)
    gathered = everything if _SHARDS[strategy] > 1 else 0
    return speed.data_parallel(clocks[0], work, gathered=gathered, trained=trained)


def _check_lengths(recipe: FinetuneRecipe | InferenceRecipe, card: ModelCard) -> None:
    key = "sequence_len" if isinstance(recipe, FinetuneRecipe) else "max_model_len"
    value = getattr(recipe, key)
    if card.max_positions is not None and value > card.max_positions:
        raise UnfitError(
            key,
            f"{value} is longer than the {card.max_positions} positions that {card.name} allows",
            f"set it to at most {card.max_positions}",
        )


def refuse_unfit(recipe: FinetuneRecipe | InferenceRecipe, made: Plan) -> None:
    """Refuse to start what a node has no room for.

    Raises:
        RefusedError: the plan does not fit.
    """
    if made.fits:
        return
    worst = min(made.ranks, key=lambda rank: rank.headroom)
    where = f"{worst.node}, where {worst.box.usable / GIB:.1f} GiB can be used"
    if worst.box.is_busy:
        where += " now"
    ways = [way.text for way in made.ways]
    raise RefusedError(
        f"{recipe.name}: does not fit: rank {worst.rank} needs {worst.memory.total / GIB:.1f} GiB on {where}",
        "set " + ", or ".join(ways) if ways else "choose a smaller model; `sparkctl plan` shows what takes the room",
    )


def refuse_absent(recipe: Recipe) -> None:
    """Refuse what is part of the recipe's language but not of this version, rather than run something else instead."""
    if isinstance(recipe, CommandRecipe):
        raise RefusedError(
            f"{recipe.name}: what a command takes is not known, so there is nothing to plan",
            "`sparkctl run RECIPE --dry-run` shows what it would run",
        )
    missing = _missing(recipe)
    if missing is not None:
        what, instead = missing
        raise RefusedError(f"{recipe.name}: {what} is not in this version of sparkctl", instead)


def _missing(recipe: FinetuneRecipe | InferenceRecipe) -> tuple[str, str] | None:
    absent: list[tuple[bool, str, str]] = []
    if isinstance(recipe, FinetuneRecipe):
        absent = [
            (
                recipe.adapter == "qlora" and recipe.strategy == "fsdp2",
                "`adapter: qlora` with `strategy: fsdp2`",
                "use `strategy: pipeline`, or `ddp` where the model in 4 bits fits one node",
            ),
            (recipe.strategy == "zero3", f"`strategy: {recipe.strategy}`", "use `strategy: pipeline`"),
            (any(data.split for data in recipe.datasets), "`datasets[].split`", "leave it out: a file is taken whole"),
        ]
    return next(((what, instead) for wrong, what, instead in absent if wrong), None)
