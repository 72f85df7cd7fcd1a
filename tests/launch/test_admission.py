"""Several jobs at once as long as their plans fit together; else the last is refused, and told who holds the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from cluster.errors import RefusedError
from launch.admission import Held, refuse_crowded
from launch.box import GIB, SPARK, SPARK_MEMORY, Box
from launch.plan import RankPlan


@dataclass
class Memory:
    total: int


@dataclass
class Rank:
    """As much of a plan's rank as counts here."""

    node: str
    box: Box
    memory: Memory


def plan(gib: float, *, ranks: int = 1) -> list[RankPlan]:
    # Next to nothing is free now: what runs has taken it, and its plan counts already.
    boxes = [Box(node, SPARK_MEMORY, 7 * GIB, True, SPARK, "", ranks) for node in ("a", "b")]
    found: list[Any] = [Rank(box.node, box, Memory(int(gib * GIB))) for box in boxes]
    return cast("list[RankPlan]", found)


def held(job: str, gib: float, *nodes: str) -> list[Held]:
    return [Held(job, node, int(gib * GIB)) for node in nodes or ("a", "b")]


def test_jobs_run_side_by_side_as_long_as_their_plans_fit_together() -> None:
    refuse_crowded("new", plan(100), [])
    refuse_crowded("new", plan(30), [*held("one", 30), *held("two", 30)])
    refuse_crowded("new", plan(40), [*held("one", 60, "b"), *held("two", 65, "a")])


def test_one_too_many_is_told_who_holds_the_memory() -> None:
    with pytest.raises(RefusedError) as told:
        refuse_crowded("new", plan(60), [*held("small", 20), *held("large", 40)])
    assert told.value.message == (
        "new takes 60.0 GiB of a, which has 109.7 GiB for jobs: small (20.0 GiB), large (40.0 GiB) hold the rest"
    )
    assert told.value.fix == "`sparkctl stop large` makes room; `sparkctl jobs` lists all"


def test_the_fuller_node_decides() -> None:
    with pytest.raises(RefusedError, match=r"of b, .*: whole .* holds the rest"):
        refuse_crowded("new", plan(60), held("whole", 60, "b"))


def test_two_ranks_on_one_machine_share_its_memory() -> None:
    with pytest.raises(RefusedError, match=r"which has 54\.8 GiB for jobs"):
        refuse_crowded("new", plan(30, ranks=2), held("one", 30))


def test_alone_it_is_the_plans_to_refuse() -> None:
    refuse_crowded("new", plan(300), [Held("a-command", "a", 0)])
