"""From a recipe to a running job: read, check everything that can be checked, plan, have the nodes start it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import yamlfile
from cluster.errors import WrongInputError
from cluster.inventory import Inventory, Node, is_secret
from launch import admission, box, hub, model_card, recipe, rows
from launch import plan as planning
from launch.admission import Held
from launch.box import Box
from launch.model_card import ModelCard
from launch.plan import Plan, RankPlan, UnfitError
from launch.recipe import CommandRecipe, FinetuneRecipe, InferenceRecipe, Recipe
from launch.speed import TrainingSpeed

if TYPE_CHECKING:
    from cluster.record import PairRecord
    from cluster.transfer import Progress
    from launch.halves import Placed, Wants
    from launch.handle import JobHandle, PairHandle, Row
    from launch.inference.request import Request
    from launch.spec import RankSpec


@dataclass(frozen=True)
class Prepared:
    """A recipe that was found right, and where everything of it goes. Nothing has been made yet."""

    recipe: FinetuneRecipe | InferenceRecipe
    source: str
    card: ModelCard
    plan: Plan
    inventory: Inventory
    wants: Wants | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)  # where each lies, by the name that the recipe gives it


def prepare_file(
    path: Path,
    overrides: Sequence[str],
    inventory: Inventory,
    pair: PairHandle | None = None,
    *,
    force: bool = False,
) -> Prepared:
    """Read, check and plan a recipe file to start it; errors that only the model shows are told by file and line too.

    Raises:
        WrongInputError, RefusedError: see `prepare`, and a wrong recipe file.
    """
    return _from_file(path, overrides, partial(prepare, inventory=inventory, pair=pair, source=str(path), force=force))


def survey_file(
    path: Path,
    overrides: Sequence[str],
    inventory: Inventory,
    pair: PairHandle | None = None,
    *,
    memory: float | None = None,
) -> Prepared:
    """Read and plan a recipe file, to look at.

    Raises:
        WrongInputError, RefusedError: see `survey`, and a wrong recipe file.
    """
    return _from_file(path, overrides, partial(survey, inventory=inventory, pair=pair, source=str(path), memory=memory))


def _from_file(path: Path, overrides: Sequence[str], make: Callable[[Recipe], Prepared]) -> Prepared:
    wanted = recipe.load(path, overrides, must_exist=True)
    try:
        return make(wanted)
    except UnfitError as error:
        document = yamlfile.override(yamlfile.read(path), overrides, yamlfile.spellings(type(wanted)))
        raise yamlfile.wrong(document, type(wanted), (error.key,), error.problem, error.fix) from None


def prepare(
    wanted: Recipe, inventory: Inventory, pair: PairHandle | None = None, *, source: str = "", force: bool = False
) -> Prepared:
    """Check the model, the data and the pair, and lay the model out, so that it can be started.

    Args:
        pair: reaches the nodes, where they are not this machine: what the recipe names may lie on them, or on the hub.
        force: whether what does not fit is let through all the same.

    Raises:
        WrongInputError: the model folder, a dataset or a value that goes with them is wrong.
        RefusedError: understood, but not to be had; or there is no room for it.
        FailedError: a node, or the hub, cannot be asked.
    """
    planning.refuse_absent(wanted)
    assert not isinstance(wanted, CommandRecipe)  # refused above
    adapters = _adapters(wanted, inventory, pair)
    if pair is None or inventory.embedded:
        boxes = _boxes(planning.nodes_of(wanted, inventory), inventory, None)
        fetched = _from_hub(wanted.base_model)
        card = fetched.model.card() if fetched else model_card.read(Path(wanted.base_model))
        prepared = _plan(wanted, card, inventory, source, boxes, fetched, adapters)
    else:
        from launch import supply

        nodes = [pair.transport(node.name) for node in inventory.nodes]
        wants = supply.find(wanted, nodes, local=_local(inventory), named=adapters)
        boxes = _boxes(planning.nodes_of(wanted, inventory), inventory, pair)
        prepared = _plan(wanted, wants.model.card(), inventory, source, boxes, wants, adapters)
    if not force:
        planning.refuse_unfit(wanted, prepared.plan)
    return prepared


def survey(
    wanted: Recipe,
    inventory: Inventory,
    pair: PairHandle | None = None,
    *,
    source: str = "",
    memory: float | None = None,
) -> Prepared:
    """Lay a model out without starting anything: its weights need not be there, nor need it fit.

    Args:
        pair: one that has been made, whose nodes are asked what memory they have, and for a model that is not here.
        memory: plan for boxes of so many GiB instead of the inventory's.

    Raises:
        WrongInputError: no such model, here or on the hub; what is there of it, or of the data, is wrong.
        FailedError: the hub cannot be asked.
    """
    if isinstance(wanted, CommandRecipe):
        planning.refuse_absent(wanted)
    assert not isinstance(wanted, CommandRecipe)  # refused above
    adapters = _adapters(wanted, inventory, pair)
    folder = Path(wanted.base_model)
    if hub.is_id(wanted.base_model) and not folder.is_dir():
        card = hub.read(wanted.base_model)
    elif pair is not None and not folder.exists():
        from launch import origin

        there = [pair.transport(node.name) for node in inventory.nodes]
        card = origin.find(wanted.base_model, there, local=_local(inventory)).card()
    else:
        card = model_card.read(folder, needs_weights=False)
    nodes = planning.nodes_of(wanted, inventory)
    boxes = _boxes(nodes, inventory, pair) if memory is None else box.asked(nodes, memory)
    return _plan(wanted, card, inventory, source, boxes, adapters=adapters)


def _adapters(
    wanted: FinetuneRecipe | InferenceRecipe, inventory: Inventory, pair: PairHandle | None
) -> dict[str, str]:
    """Where each adapter lies, by the name that the recipe gives it. A pair that is not made yet knows of no job."""
    if not isinstance(wanted, InferenceRecipe):
        return {}
    if wanted.adapter_from is not None and (pair is not None or inventory.embedded):
        from launch import questions
        from launch.handle import PairHandle

        with PairHandle(inventory) if pair is None else contextlib.nullcontext(pair) as asked:
            job = asked.find(wanted.adapter_from)
            return {wanted.adapter_from: questions.adapter_of(job, wanted.base_model)}
    return {wanted.adapter_path: wanted.adapter_path} if wanted.adapter_path is not None else {}


def _local(inventory: Inventory) -> str | None:
    return next((node.name for node in inventory.nodes if node.is_local), None)


def _from_hub(model: str) -> Wants | None:
    """What the embedded pair has to fetch first; None: the model lies here."""
    if not hub.is_id(model) or Path(model).is_dir():
        return None
    from launch import supply

    return supply.from_hub(model)


def _plan(
    wanted: FinetuneRecipe | InferenceRecipe,
    card: ModelCard,
    inventory: Inventory,
    source: str,
    boxes: Sequence[Box],
    wants: Wants | None = None,
    adapters: Mapping[str, str] | None = None,
) -> Prepared:
    """Lay the model out; where its weights lie here, so that it could be started, check what goes with them too."""
    is_here = wants is None and card.has_weights and card.folder.is_dir()  # else it has been checked
    if is_here:
        _check_tokenizer(card.folder)
    adapter: tuple[int, ...] = ()
    if wants is not None and wants.adapters is not None:
        from launch import supply

        adapter = supply.adapter_elements(wants.adapters, card.layers)
    else:
        for reference in (adapters or {}).values():
            if not recipe.is_on_node(reference):  # what lies on a node is looked at before it is started
                adapter = model_card.adapter_elements(Path(reference), card.layers)
    made = planning.plan(wanted, card, boxes, adapter=adapter)
    if (is_here or inventory.embedded) and isinstance(wanted, FinetuneRecipe):
        for dataset in wanted.datasets:
            rows.check(Path(dataset.path), dataset.type, skip_bad=wanted.skip_bad_rows)
    return Prepared(wanted, source, card, made, inventory, wants, adapters or {})


def _boxes(nodes: Sequence[Node], inventory: Inventory, pair: PairHandle | None) -> tuple[Box, ...]:
    """The boxes of the nodes, by what they tell of themselves and what this machine knows of its own."""
    memories, gpus = pair.boxes() if pair is not None else ({}, {})
    memory = box.this_memory()
    known = memories | {node.name: memory for node in nodes if node.is_local and memory is not None}
    return box.of(nodes, known, gpus=gpus, embedded=inventory.embedded, has_gpu=box.this_has_gpu())


def start(
    prepared: Prepared,
    pair: PairHandle,
    *,
    version: str,
    requests: Sequence[Request] = (),
    watch: Callable[[Progress], None] = lambda moved: None,
) -> JobHandle:
    """Bring the nodes what they need, make the job's folder on them and start their agents, which outlive this program.

    Args:
        watch: told of everything that is copied, by several threads.

    Raises:
        RefusedError: the nodes are no pair, have another version of our code, or no room on the disk; or other jobs leave no room
            for this one.
        FailedError: a node cannot be reached, or cannot do it; nothing of the job is left then.
    """
    # What only starting needs: a plan is shown in half the time without.
    import secrets

    from launch import job, reach
    from launch.spec import JobSpec

    pair.connect()
    pair.refuse_old_code()
    rows, inventory = pair.rows()[0], prepared.inventory
    admission.refuse_crowded(prepared.recipe.name, prepared.plan.ranks, _held(rows))
    placed = _place(prepared, pair, watch)
    hidden = {name: value for name, value in inventory.env.items() if is_secret(name)}
    spec = JobSpec(
        id=job.new_id(prepared.recipe.name, {row.id for row in rows}),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version,
        recipe=prepared.recipe.model_dump(mode="json"),
        layers=prepared.card.layers,
        ranks=tuple(_rank(prepared, planned, pair.record, placed[planned.node]) for planned in prepared.plan.ranks),
        master_addr="127.0.0.1",
        embedded=inventory.embedded,
        link=reach.link(inventory, pair.record) if len(prepared.plan.ranks) > 1 else None,
        strategy=prepared.plan.strategy,
        step_seconds=prepared.plan.speed.step if isinstance(prepared.plan.speed, TrainingSpeed) else 0.0,
        source=prepared.source,
        env={name: value for name, value in inventory.env.items() if name not in hidden},
        secrets=tuple(hidden),
        requests=tuple(requests),
    )
    return pair.launch(spec, secrets.token_urlsafe(32), hidden)


def _held(rows: Sequence[Row]) -> Iterator[Held]:
    for row in rows:
        if row.spec is not None and row.state is not None and not row.state.ended:
            yield from (Held(row.id, rank.node, rank.needed) for rank in row.spec.ranks)


def _place(prepared: Prepared, pair: PairHandle, watch: Callable[[Progress], None]) -> dict[str, Placed]:
    """Where everything lies on each node, once it does."""
    from launch import halves

    if pair.record is None:  # the ranks are on this machine, and read what the recipe names
        named, nodes = _as_named(prepared), [planned.node for planned in prepared.plan.ranks]
        if prepared.wants is not None:
            model = halves.fetch_here(prepared.wants.model, prepared.card.layers, nodes[0], watch)
            named = replace(named, model=model)
        return dict.fromkeys(nodes, named)
    assert prepared.wants is not None
    sites = halves.sites(pair.record, [pair.transport(node.name) for node in prepared.inventory.nodes])
    cuts = {planned.node: planned.cut for planned in prepared.plan.ranks}
    return halves.place(prepared.wants, cuts, sites, watch)


def _as_named(prepared: Prepared) -> Placed:
    from launch.halves import Placed

    wanted = prepared.recipe
    data = tuple(dataset.path for dataset in wanted.datasets) if isinstance(wanted, FinetuneRecipe) else ()
    return Placed(wanted.base_model, data, dict(prepared.adapters))


def _rank(prepared: Prepared, planned: RankPlan, record: PairRecord | None, placed: Placed) -> RankSpec:
    """A rank, whose node has everything where it was placed."""
    from launch import reach
    from launch.spec import RankSpec

    return RankSpec(
        rank=planned.rank,
        node=planned.node,
        start=planned.cut.start,
        end=planned.cut.end,
        model=placed.model,
        adapters=placed.adapters,
        datasets=placed.datasets,
        memory=planned.box.usable,
        needed=planned.memory.total,
        environment=reach.environment(prepared.inventory, record, planned.rank, planned.node, len(prepared.plan.ranks)),
    )


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise WrongInputError(
            f"{folder}: no tokenizer in it (tokenizer.json)", "copy the tokenizer of the model it came from"
        )
