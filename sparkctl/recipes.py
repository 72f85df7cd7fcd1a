"""`recipes`: the ready ones, and the JSON Schema that lets an editor complete and check a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sparkctl.options import Options, common


def folder() -> Path:
    """Where the ready recipes lie: inside an installed package, or beside it in a checkout."""
    packaged = Path(__file__).parent / "_data" / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / "recipes"


@click.command()
@click.option("--schema", is_flag=True, help="Print the JSON Schema of recipes.")
@common
def recipes(options: Options, schema: bool) -> None:
    """List the ready recipes, with what each is for (the first line of the file)."""
    if schema:
        from launch.recipe import json_schema

        click.echo(json.dumps(json_schema(), indent=1))
        return
    listed = [
        (path, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
        for path in sorted(folder().glob("*.yaml"))
    ]
    if options.json:
        click.echo(json.dumps([{"path": str(path), "about": about} for path, about in listed], indent=1))
        return
    from rich.table import Table

    from sparkctl.show import print_table

    options.say(f"in {folder()}")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for path, about in listed:
        table.add_row(path.name, about)
    print_table(table)
