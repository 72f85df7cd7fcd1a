"""Whether a job still fits beside those that run: by what their plans take, which is known before they have taken it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.errors import RefusedError
from launch.box import GIB
from launch.plan import RankPlan


@dataclass(frozen=True)
class Held:
    """What a rank of a job that runs takes of its node by its plan, in bytes."""

    job: str
    node: str
    needed: int


def refuse_crowded(name: str, ranks: Sequence[RankPlan], held: Iterable[Held]) -> None:
    """Refuse a job for which the jobs that run leave no room.

    What is free at this moment says less: a job that is still being loaded has not taken yet what its plan says.

    Args:
        name: the job's.
        ranks: its plan; of each box the whole counts, not what is free now.

    Raises:
        RefusedError: with the jobs that hold the memory.
    """
    running = list(held)
    for rank in ranks:
        box = rank.box
        room = max(0, box.total - 2 * box.reserve) // box.ranks
        there = [one for one in running if one.node == rank.node and one.needed]
        taken = sum(one.needed for one in there)
        if there and taken + rank.memory.total > room:
            holders = ", ".join(f"{one.job} ({one.needed / GIB:.1f} GiB)" for one in there)
            raise RefusedError(
                f"{name} takes {rank.memory.total / GIB:.1f} GiB of {rank.node}, which has {room / GIB:.1f} GiB for jobs: {holders}"
                f" {'holds' if len(there) == 1 else 'hold'} the rest",
                f"`sparkctl stop {max(there, key=lambda one: one.needed).job}` makes room; `sparkctl jobs` lists all",
            )
