"""`sparkctl merge`: a fine-tuned job's adapter, added into its model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sparkctl.options import Options, common
from sparkctl.quantize import bar


@click.command()
@click.argument("job")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="The new folder to write."
)
@click.option("--base", type=click.Path(path_type=Path), metavar="MODEL", help="Another folder of the same base model.")
@common
def merge(options: Options, *, job: str, output: Path, base: Path | None) -> None:
    """Write JOB's model with its LoRA adapter in it, so that it runs without: in vLLM, llama.cpp, transformers.

    It is done tensor by tensor, so the model need not fit into memory. Run it where the job's folder and the model lie: on the
    head. A model that was trained in 4 bits is merged in the precision of `base_model`.
    """
    from cluster.errors import WrongInputError
    from launch import questions

    with options.pair() as pair:
        recipe = questions.recipe_for(pair.find(job))
    if recipe.adapter_path is None:
        raise WrongInputError(
            f"job {job} trained the whole model: there is nothing to merge", "its model/ folder is the result"
        )
    adapter, model = Path(recipe.adapter_path), base or Path(recipe.base_model)
    for folder, what in ((adapter, "the job's adapter"), (model, "its base model")):
        if not folder.is_dir():
            raise WrongInputError(
                f"{folder}: {what} does not lie on this machine", "run this on the head, or give --base"
            )
    from launch.finetune import merge as merging

    with bar("merging", options) as progress:
        made = merging.merge(model, adapter, output, progress)
    if options.json:
        click.echo(json.dumps({"folder": str(made.folder), "bytes": made.size, "changed": made.changed}))
    options.say(f"wrote {made.folder}: {made.size / 1e9:.2f} GB, {made.changed} matrices changed")
