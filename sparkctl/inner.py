"""What agents, torchrun and other machines' command lines call: one job's agent, one job's rank, orders to this node."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click


@click.command(hidden=True)
@click.argument("folder")
def agent(folder: str) -> int:
    """Supervise the job in FOLDER on this node."""
    from launch.agent import entry

    return entry.main(folder)


@click.command(hidden=True)
def orders() -> None:
    """Do on this node what a command line elsewhere asks, a line of JSON each, until there are no more."""
    from launch import orders

    orders.main()


@click.command(hidden=True)
@click.argument("folder")
def board(folder: str) -> None:
    """Serve TensorBoard of the job in FOLDER until standard input ends."""
    from pathlib import Path

    from launch import board
    from launch.job import JobFolder

    board.serve(JobFolder(Path(folder)))


@click.command(hidden=True)
@click.argument("folder")
def worker(folder: str) -> NoReturn:
    """Be the rank of the job in FOLDER that the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) says."""
    from launch import worker as rank

    status = rank.main(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is written; to take torch apart object by object would take another second


@click.command(hidden=True)
def fetch() -> int:
    """Fetch from the hub what the orders on standard input say."""
    from launch import fetch as fetching

    return fetching.main()
