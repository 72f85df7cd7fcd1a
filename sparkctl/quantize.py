"""`sparkctl quantize`: an NF4 copy of a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from sparkctl.options import Options, common


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="The new folder to write."
)
@common
def quantize(options: Options, *, model: Path, output: Path) -> None:
    """Write an NF4 copy of the model in the folder MODEL: 4 bits a weight, a mixture's experts too.

    16-bit checkpoints are taken, and gpt-oss's MXFP4. It is done layer by layer, so the model need not fit into memory. A
    recipe whose `base_model` is the copy needs no `quantization`.
    """
    from launch import model_card

    model_card.read(model)  # says at once what is wrong with it, before torch is imported
    if not options.json:
        options.say(f"quantising {model}")
    from launch.shard import quantize as quantizing

    with bar("quantising", options) as progress:
        made = quantizing.quantize(model, output, progress)
    if options.json:
        click.echo(json.dumps({"folder": str(made.folder), "bytes_before": made.before, "bytes": made.after}))
    options.say(f"wrote {made.folder}: {made.after / 1e9:.2f} GB, before {made.before / 1e9:.2f} GB")


@contextmanager
def bar(what: str, options: Options) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal; None where there is none to see it."""
    if options.quiet or options.json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
