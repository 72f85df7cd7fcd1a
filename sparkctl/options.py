"""The options that every verb takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cluster.inventory import Inventory
    from launch.handle import PairHandle


@dataclass(frozen=True)
class Options:
    """What the user chose for any verb."""

    inventory_path: Path | None
    json: bool
    quiet: bool

    def inventory(self) -> Inventory:
        """The pair that the commands use; without any inventory file, the embedded one."""
        from cluster import inventory

        return inventory.load(self.inventory_path, default_embedded=True)

    def pair(self) -> PairHandle:
        """The inventory's nodes and their jobs; to be closed."""
        from launch.handle import PairHandle

        return PairHandle(self.inventory())

    def say(self, text: str) -> None:
        """Print a line for a person: nothing under -q, and on standard error under --json, whose output is the document alone."""
        if not self.quiet and not self.json:
            click.echo(text)


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb the common options; it receives them as its first argument."""

    @click.option("-i", "--inventory", "inventory_path", type=click.Path(path_type=Path), help="The pair to use.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
    @click.option("-q", "--quiet", is_flag=True, help="Print results only.")
    @click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an unexpected error.")
    @functools.wraps(command)
    def wrapped(inventory_path: Path | None, as_json: bool, quiet: bool, verbose: bool, **given: Any) -> Any:
        del verbose  # read from the arguments where errors are told
        return command(Options(inventory_path, as_json, quiet), **given)

    return wrapped
