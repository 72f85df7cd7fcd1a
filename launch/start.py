"""From a recipe to a running job: read, check everything that can be checked, plan, make the folder, start the agent."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cluster import environ, yamlfile
from cluster.errors import RefusedError, WrongInputError
from cluster.inventory import Inventory, is_secret
from cluster.transport.local import LocalTransport
from launch import job, model_card, recipe, rows
from launch import plan as planning
from launch.inference.request import Request
from launch.job import JobFolder, JobSpec, RankSpec
from launch.model_card import ModelCard
from launch.plan import Plan, UnfitError
from launch.recipe import CommandRecipe, FinetuneRecipe, Recipe


@dataclass(frozen=True)
class Prepared:
    """A recipe that was found right, and where everything of it goes. Nothing has been made yet."""

    recipe: Recipe
    source: str
    card: ModelCard
    plan: Plan
    inventory: Inventory


def prepare_file(path: Path, overrides: Sequence[str], inventory: Inventory) -> Prepared:
    """Read, check and plan a recipe file; errors that only the model shows are told by file and line too.

    Raises:
        WrongInputError, RefusedError: see `prepare`, and a wrong recipe file.
    """
    wanted = recipe.load(path, overrides, must_exist=True)
    try:
        return prepare(wanted, inventory, source=str(path))
    except UnfitError as error:
        document = yamlfile.override(yamlfile.read(path), overrides, yamlfile.spellings(type(wanted)))
        raise yamlfile.wrong(document, type(wanted), (error.key,), error.problem, error.fix) from None


def prepare(wanted: Recipe, inventory: Inventory, *, source: str = "") -> Prepared:
    """Check the model, the data and the pair, and lay the model out.

    Raises:
        WrongInputError: the model folder, a dataset or a value that goes with them is wrong.
        RefusedError: understood, but not to be had.
    """
    planning.refuse_absent(wanted)
    assert not isinstance(wanted, CommandRecipe)  # refused above
    card = model_card.read(Path(wanted.base_model))
    _check_tokenizer(card.folder)
    made = planning.plan(wanted, card, inventory)
    if any(node.transport != "local" for node in planning.nodes_of(wanted, inventory)):
        raise RefusedError(
            "nodes over SSH are not in this version of sparkctl",
            "use two nodes with `transport: local`, the embedded pair",
        )
    if isinstance(wanted, FinetuneRecipe):
        for dataset in wanted.datasets:
            for _ in rows.read(Path(dataset.path), dataset.type):
                pass
    return Prepared(wanted, source, card, made, inventory)


def start(prepared: Prepared, *, version: str, requests: Sequence[Request] = ()) -> JobFolder:
    """Make the job's folder and start its agent, which outlives this program."""
    inventory = prepared.inventory
    spec = JobSpec(
        id=job.new_id(prepared.recipe.name),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version,
        recipe=prepared.recipe.model_dump(mode="json"),
        layers=prepared.card.layers,
        ranks=tuple(RankSpec(rank=r.rank, node=r.node, start=r.cut.start, end=r.cut.end) for r in prepared.plan.ranks),
        master_addr="127.0.0.1",
        embedded=inventory.embedded,
        strategy=prepared.plan.strategy,
        source=prepared.source,
        env={name: value for name, value in inventory.env.items() if not is_secret(name)},
        requests=tuple(requests),
    )
    folder = job.create(spec)
    # Secrets of the inventory's `env` reach the ranks through the agent's own environment: they stand in no file.
    secrets = {name: value for name, value in inventory.env.items() if is_secret(name)}
    head = LocalTransport(spec.ranks[0].node)
    # -P: what lies in the folder where it starts must not pass for a module.
    argv = [sys.executable, "-P", "-m", "sparkctl", "agent", str(folder.path)]
    try:
        head.start(argv, log=str(folder.agent_log), env=environ.for_agent(os.environ, secrets))
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    return folder


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise WrongInputError(
            f"{folder}: no tokenizer in it (tokenizer.json)", "copy the tokenizer of the model it came from"
        )
