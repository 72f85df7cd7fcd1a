"""recipe.yaml: what to do with a model, as a FinetuneRecipe, an InferenceRecipe or a CommandRecipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cluster import yamlfile
from cluster.yamlfile import Document
from launch.recipe_schema import CommandRecipe, Dataset, FinetuneRecipe, InferenceRecipe, Restart, Sides

__all__ = [
    "CommandRecipe",
    "Dataset",
    "FinetuneRecipe",
    "InferenceRecipe",
    "Recipe",
    "Restart",
    "Sides",
    "is_on_node",
    "json_schema",
    "load",
    "parse_dump",
]

Recipe = Annotated[FinetuneRecipe | InferenceRecipe | CommandRecipe, Field(discriminator="kind")]

_KINDS: dict[str, type[FinetuneRecipe | InferenceRecipe | CommandRecipe]] = {
    "finetune": FinetuneRecipe,
    "inference": InferenceRecipe,
    "command": CommandRecipe,
}

# Keys that name something to read. An output_dir is written, and means what it means to every program: from here on.
_REFERENCES = ("base_model", "model", "adapter_path", "resume_from_checkpoint")
_DATA_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


class _Kind(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    kind: Literal["finetune", "inference", "command"] = Field(
        description="Every recipe says what it is: finetune, inference or command."
    )


def load(path: Path, overrides: Sequence[str] = (), *, must_exist: bool = False) -> Recipe:
    """Read a recipe and apply the `--set` assignments in `overrides`; a missing name becomes the file's stem.

    Models, datasets, adapters and checkpoints are names until they are found. `~` and absolute paths are taken as they
    are. Any other is looked for beside the recipe, so that a folder with a recipe and its data can be moved, and then
    in the current folder; what a `--set` gives is looked for in the current folder first, where it was typed. What is
    found becomes absolute. What is not found stays as written, a Hugging Face id such as `Qwen/Qwen3-32B` (so a folder
    of that name wins over the hub, as in transformers), unless it starts with `./` or `../`: that counts from the
    recipe. `output_dir` counts from the current folder alone: ready recipes may lie where nobody can write.

    `NODE:/PATH` is a path on that node of the pair, and stays as written too.

    With `must_exist`, what can only be a path of this machine (`~`, `./`, `../`, a data file's ending) has to be there.

    Raises:
        WrongInputError: `FILE:LINE: key: what is wrong`, or `--set KEY=VALUE: key: ...`.
    """
    written = yamlfile.read(path)
    model = _model_of(yamlfile.override(written, overrides))
    document = yamlfile.override(written, overrides, yamlfile.spellings(model))
    document = replace(document, data={"name": _name_from(path), **document.data})
    return _with_paths(yamlfile.parse(model, document), document, must_exist=must_exist)


def parse_dump(data: Mapping[str, Any]) -> Recipe:
    """The recipe that `recipe.model_dump(mode="json")` was made of, as a job's spec.json holds it.

    Raises:
        WrongInputError: it is no such dump.
    """
    document = Document(Path("spec.json"), dict(data), {})
    return yamlfile.parse(_model_of(document), document)


def json_schema() -> dict[str, Any]:
    """One JSON Schema (draft 2020-12) for all three kinds, for editors' YAML language servers; knows every spelling."""
    schema = TypeAdapter[Any](Recipe).json_schema()
    del schema["discriminator"]  # OpenAPI's, not JSON Schema's; each kind is a const already
    for model in _KINDS.values():
        _add_spellings(schema["$defs"][model.__name__], yamlfile.spellings(model))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sparkctl recipe",
        "description": "What to do with a model on a pair: fine-tune it, serve it, or run any other program.",
        **schema,
    }


def _model_of(document: Document) -> type[FinetuneRecipe | InferenceRecipe | CommandRecipe]:
    return _KINDS[yamlfile.parse(_Kind, document).kind]


def _name_from(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:63] or "recipe"


def _with_paths(recipe: Recipe, document: Document, *, must_exist: bool) -> Recipe:
    """The recipe with every reference that is found made absolute."""
    beside, here = document.path.absolute().parent.resolve(), Path.cwd()
    updates: dict[str, Any] = {}
    datasets = list(getattr(recipe, "datasets", ()))
    for key_path, reference in _references(recipe):
        typed = any(key_path[: len(origin)] == origin for origin in document.origins)
        found = _locate(reference, (here, beside) if typed else (beside, here))
        if must_exist and _only_local(reference) and not _exists(Path(found)):
            places = f"looked in {beside}" + (f" and {here}" if here != beside else "")
            what, fix = (
                f"no such file or folder: {reference}",
                "check the path" if reference.startswith("~") else places,
            )
            raise yamlfile.wrong(document, type(recipe), key_path, what, fix)
        if key_path[0] == "datasets":
            datasets[int(key_path[1])] = datasets[int(key_path[1])].model_copy(update={"path": found})
        else:
            updates[str(key_path[0])] = found
    if datasets:
        updates["datasets"] = tuple(datasets)
    if (output := getattr(recipe, "output_dir", None)) is not None:
        updates["output_dir"] = str(_tidy(here / _expanded(output)))
    return recipe.model_copy(update=updates)


def _references(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    for key in _REFERENCES:
        reference = getattr(recipe, key, None)
        if reference is not None and (key, reference) != ("resume_from_checkpoint", "auto"):
            yield (key,), reference
    for index, dataset in enumerate(getattr(recipe, "datasets", ())):
        yield ("datasets", index, "path"), dataset.path


def _locate(reference: str, folders: Sequence[Path]) -> str:
    """The absolute path that `reference` means, or `reference` itself where it can be no more than a hub's id."""
    path = _expanded(reference)
    if is_on_node(reference):
        return reference
    if path.is_absolute():
        return str(path)
    candidates = [_tidy(folder / path) for folder in folders]
    found = next((candidate for candidate in candidates if _exists(candidate)), None)
    if found is None and _is_explicit(reference):
        found = candidates[0]
    return reference if found is None else str(found)


def _expanded(reference: str) -> Path:
    try:
        return Path(reference).expanduser()
    except RuntimeError:  # ~nobody
        return Path(reference)


def _is_explicit(reference: str) -> bool:
    return reference in (".", "..") or reference.startswith(("./", "../"))


def is_on_node(reference: str) -> bool:
    """Whether it names a node of the pair and a path there: NODE:/PATH or NODE:~/PATH."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,62}:[/~].*", reference, re.DOTALL) is not None


def _only_local(reference: str) -> bool:
    return not is_on_node(reference) and _names_a_path(reference)


def _names_a_path(reference: str) -> bool:
    return _is_explicit(reference) or reference.startswith("~") or reference.endswith(_DATA_ENDINGS)


def _tidy(path: Path) -> Path:
    # Not path.resolve(): a hub's cache links `data.jsonl` to a nameless blob, and the name's ending says what it is.
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for any file, a folder that may not be entered
        return False


def _add_spellings(schema: dict[str, Any], spelled: Mapping[str, str]) -> None:
    """Let a schema take a model's other spellings; one of them satisfies a required key."""
    properties = schema["properties"]
    properties["name"].pop("default")  # it depends on the file's name
    for other, key in spelled.items():
        if other != key:
            properties[other] = {
                **properties[key],
                "description": f"Another spelling of {key}. {properties[key]['description']}",
            }
    choices = {key: [other for other in spelled if spelled[other] == key] for key in schema["required"]}
    schema["required"] = [key for key, names in choices.items() if len(names) == 1]
    several = [{"anyOf": [{"required": [name]} for name in names]} for names in choices.values() if len(names) > 1]
    if several:
        schema["allOf"] = several
