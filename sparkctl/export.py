"""`export`: the same job for a cluster, a cloud or a DGX, as a script."""

from __future__ import annotations

from pathlib import Path

import click

from sparkctl import __version__
from sparkctl.options import Options, common


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(["slurm", "torchrun"]), required=True, help="What is to start it.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a key of the recipe; may be repeated."
)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="A file, in place of the screen.")
@common
def export(options: Options, recipe: Path, target: str, overrides: tuple[str, ...], output: Path | None) -> None:
    """Print the job of RECIPE as a script that needs only the installed package.

    It is planned for the nodes of the inventory; the model and the data must lie in the same place wherever it runs.
    """
    from launch import export as exporting
    from launch import recipe as recipes
    from launch import start
    from launch.recipe import CommandRecipe

    to: exporting.Target = "slurm" if target == "slurm" else "torchrun"
    wanted = recipes.load(recipe, overrides, must_exist=False)
    if isinstance(wanted, CommandRecipe):
        text = exporting.command_script(wanted, to, version=__version__)
    else:
        prepared = start.survey_file(recipe, overrides, options.inventory())
        text = exporting.script(prepared, to, version=__version__)
    if output is None:
        click.echo(text, nl=False)
        return
    from cluster.errors import FailedError

    try:
        output.write_text(text, encoding="utf-8")
        output.chmod(0o755)
    except OSError as error:
        raise FailedError(f"{output}: {error.strerror}", "name another file with -o") from None
    options.say(f"{output}: {'sbatch' if to == 'slurm' else 'sh'} {output}")
