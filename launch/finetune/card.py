"""The model card of a result: README.md in its folder, from which somebody else could make it again."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from cluster.files import write_atomically
from launch.job import JobSpec
from launch.recipe import Dataset, FinetuneRecipe, parse_dump

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
# What says where, not what: it differs from machine to machine.
_PLACES = frozenset({"name", "nodes", "restart", "output_dir", "resume_from_checkpoint", "kind"})


def write(folder: Path, spec: JobSpec, recipe: FinetuneRecipe, metrics: Path, *, samples: int, held_out: int) -> None:
    """Write README.md into the folder of an adapter or a model.

    Args:
        recipe: as this rank has it: where the data lie on its node.
        metrics: the job's metrics.jsonl.
    """
    named = parse_dump(spec.recipe)
    assert isinstance(named, FinetuneRecipe)
    text = render(named, spec, [_row(one) for one in recipe.datasets], _entries(metrics), samples, held_out)
    write_atomically(folder / "README.md", text.encode())


def render(
    recipe: FinetuneRecipe,
    spec: JobSpec,
    data: list[tuple[str, str, str]],
    entries: list[dict[str, Any]],
    samples: int,
    held_out: int,
) -> str:
    """The card's text. Pure, but for the versions of packages.

    Args:
        data: of each dataset its name, its type and its SHA-256.
        entries: the lines of metrics.jsonl.
    """
    base = recipe.base_model
    is_id = not Path(base).is_absolute()
    base = base if is_id else Path(base).name
    front: dict[str, Any] = {"base_model": base} if is_id else {}
    front["library_name"] = "transformers" if recipe.adapter == "full" else "peft"
    front["pipeline_tag"] = "text-generation"
    front["tags"] = ["sparkctl", recipe.adapter]
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {recipe.name}", "",
        f"{base}, fine-tuned with sparkctl {spec.version} (`adapter: {recipe.adapter}`, `strategy: {spec.strategy}`, "
        f"{spec.world_size} rank{'s' * (spec.world_size != 1)}).", "", "```sh",
        f'sparkctl ask {spec.id} "your question"', "```", "", "## Losses", "", *_losses(entries), "", "## Data", "",
        f"{samples:,} {'rows of packed samples' if recipe.sample_packing else 'samples'} to train on, {held_out:,} held out.",
        "", "| dataset | type | SHA-256 |", "|---|---|---|",
        *(f"| {name} | {kind} | `{digest}` |" for name, kind, digest in data), "", "## Recipe", "", "```yaml",
        _recipe(recipe), "```", "", "## Versions", "", _versions(spec), "",
    ]  # fmt: skip
    return "\n".join(lines)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file; of a folder, that of the list of its files, as `sha256sum *` prints it."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(one for one in path.iterdir() if one.is_file())
    return hashlib.sha256("".join(f"{digest_of(one)}  {one.name}\n" for one in files).encode()).hexdigest()


def _row(dataset: Dataset) -> tuple[str, str, str]:
    try:
        digest = digest_of(Path(dataset.path))
    except OSError:  # it may have gone since it was read
        digest = "unknown"
    return Path(dataset.path).name, dataset.type, digest


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    except (OSError, ValueError):
        return []


def _losses(entries: list[dict[str, Any]]) -> list[str]:
    steps = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    rows = [
        (f"training, {which} logged step", entry["step"], entry["loss"], entry["token_accuracy"])
        for which, entry in (("first", steps[0]), ("last", steps[-1]))
    ] if steps else []  # fmt: skip
    rows += [("evaluation", one["step"], one["eval_loss"], one["eval_token_accuracy"]) for one in evaluations[-1:]]
    return [
        "| | step | loss | token accuracy |",
        "|---|---|---|---|",
        *(f"| {what} | {step} | {loss:.4f} | {accuracy:.1%} |" for what, step, loss, accuracy in rows),
    ]


def _recipe(recipe: FinetuneRecipe) -> str:
    dump = recipe.model_dump(mode="json", exclude_none=True)
    document = {"kind": "finetune", **{key: value for key, value in dump.items() if key not in _PLACES}}
    document["base_model"] = (
        recipe.base_model if not Path(recipe.base_model).is_absolute() else Path(recipe.base_model).name
    )
    for dataset in document["datasets"]:
        dataset["path"] = Path(dataset["path"]).name
    return str(yaml.safe_dump(document, sort_keys=False)).rstrip()


def _versions(spec: JobSpec) -> str:
    found = [f"sparkctl {spec.version}", f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
