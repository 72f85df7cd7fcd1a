"""What agents and torchrun call: one job's agent, one job's rank."""

from __future__ import annotations

import click


@click.command(hidden=True)
@click.argument("folder")
def agent(folder: str) -> int:
    """Supervise the job in FOLDER on this node."""
    from launch.agent import supervise

    return supervise.main(folder)


@click.command(hidden=True)
@click.argument("folder")
def worker(folder: str) -> int:
    """Be the rank of the job in FOLDER that the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) says."""
    from launch import worker as rank

    return rank.main(folder)
