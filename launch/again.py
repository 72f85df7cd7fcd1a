"""A job that was, started once more exactly as it was; and by which hashes one tells that it is the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import code
from cluster.errors import RefusedError, SparkctlError, WrongInputError
from launch import job, reach
from launch.spec import JobSpec

if TYPE_CHECKING:
    from launch.handle import JobHandle, PairHandle, Row
    from launch.recipe import Recipe

_DIGITS = 12


def fingerprints(spec: JobSpec) -> dict[str, str]:
    """What tells two jobs apart, as short SHA-256: the recipe, the plan (who holds what), our code, the model. Pure.

    A fingerprint is empty where the job was made without it.
    """
    plan = [spec.strategy, spec.layers, *([rank.node, rank.start, rank.end] for rank in spec.ranks)]
    return {"recipe": _digest(spec.recipe), "plan": _digest(plan), "code": spec.code, "model": spec.model}


def finished_before(wanted: Recipe, rows: Sequence[Row]) -> str | None:
    """The newest job that has finished this very recipe, if there is one. Pure."""
    dump = wanted.model_dump(mode="json")
    for row in reversed(rows):
        if (
            row.spec is not None
            and row.state is not None
            and row.state.state == "succeeded"
            and row.spec.recipe == dump
        ):
            return row.id
    return None


def model_of(path: str) -> str:
    """A model by what its folder shows without reading the weights: config.json, and names and sizes of the rest.

    Where the folder is not on this machine, its name: placed halves are named by their content.
    """
    folder = Path(path)
    if not path or not folder.is_dir():
        return folder.name
    files = sorted(file for file in folder.iterdir() if file.is_file())
    config = (folder / "config.json").read_text(errors="replace") if (folder / "config.json").is_file() else ""
    return _digest([config, [(file.name, file.stat().st_size) for file in files]])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def start(old: JobSpec, pair: PairHandle, *, version: str, force: bool = False) -> JobHandle:
    """Start a job with the same recipe, plan, model, data and variables.

    Args:
        force: with other code than it had, too.

    Raises:
        RefusedError: our code is another one than it ran with, or the nodes have another than this machine.
        WrongInputError: a secret that it had is not in the inventory.
        FailedError: a node cannot be reached, or cannot do it; nothing of the job is left then.
    """
    given = _same(old, pair, force=force)
    spec = old.model_copy(
        update={
            "id": job.new_id(str(old.recipe["name"]), {row.id for row in pair.rows()[0]}),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": version,
            "link": reach.link(pair.inventory, pair.record) if old.link is not None else None,
        }
    )
    return pair.launch(spec, secrets.token_urlsafe(32), given)


def resume(job: JobHandle, pair: PairHandle, *, force: bool = False) -> None:
    """Start a job that was stopped or has failed once more, as the same job: a fine-tune from its last complete checkpoint.

    Args:
        force: with other code than it had, too.

    Raises:
        RefusedError: it runs, or there is nothing to go on with; or see `start`.
        WrongInputError, FailedError: see `start`; what was begun on one node ends by itself.
    """
    state = job.state()
    if not state.ended:
        raise RefusedError(f"job {job.id} is {state.state}", f"sparkctl logs -f {job.id}")
    if state.state == "succeeded":
        raise RefusedError(f"job {job.id} has succeeded: it has nothing left to do", f"sparkctl run --again {job.id}")
    if job.spec.requests:
        raise RefusedError(f"job {job.id} only answered questions", "ask them again: `sparkctl ask`")
    given = _same(job.spec, pair, force=force)
    ranks = {job.node_of(rank.rank): rank.rank for rank in job.spec.ranks}
    attempt = 1 + max(job.look({}, rank)[0].attempt for rank in ranks.values())
    try:
        for node in job.nodes:
            node.ask("resume", id=job.id, attempt=attempt)
        for node in reversed(job.nodes):
            node.ask("start", id=job.id, secrets=given, unit=not pair.inventory.embedded)
    except BaseException:
        for node in job.nodes:
            with contextlib.suppress(SparkctlError):
                node.ask("stop", id=job.id, now=True)
        raise


def _same(old: JobSpec, pair: PairHandle, *, force: bool) -> dict[str, str]:
    """Refuse what would not be the same job; returns the secrets that it had."""
    pair.connect()
    pair.refuse_old_code()
    now = code.own().hash
    if old.code and old.code != now and not force:
        raise RefusedError(
            f"job {old.id} ran with code {old.code}, and this is {now}: it may not do the same",
            "add --force to run it all the same",
        )
    given = pair.inventory.env
    lacking = [name for name in old.secrets if name not in given]
    if lacking:
        raise WrongInputError(
            f"job {old.id} had {', '.join(lacking)}, whose value stands nowhere", "put it into the inventory's `env`"
        )
    return {name: given[name] for name in old.secrets}
