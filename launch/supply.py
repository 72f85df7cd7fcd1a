"""What a recipe names, found wherever it lies, and checked as far as can be told from here; then put on the nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.errors import WrongInputError
from cluster.transport import Transport
from launch import model_card, origin, rows
from launch.halves import Wants
from launch.origin import HERE, Origin
from launch.recipe import FinetuneRecipe, InferenceRecipe

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def find(
    wanted: FinetuneRecipe | InferenceRecipe,
    nodes: Sequence[Transport],
    *,
    local: str | None,
    named: Mapping[str, str] | None = None,
) -> Wants:
    """Where the recipe's model, data and adapter lie.

    Args:
        nodes: of the pair, head first.
        local: the name of the node that is this machine; None: it is no node.
        named: where the adapters lie, by the names that the recipe gives them.

    Raises:
        WrongInputError: something is nowhere, or is not what it should be.
        FailedError: a node or the hub cannot be asked.
    """
    model = origin.find(wanted.base_model, nodes, local=local)
    _check_tokenizer(model)
    datasets: tuple[Origin, ...] = ()
    adapters: dict[str, Origin] = {}
    if isinstance(wanted, FinetuneRecipe):
        datasets = tuple(origin.find(one.path, nodes, local=local, what="dataset") for one in wanted.datasets)
        for one, found in zip(wanted.datasets, datasets, strict=True):
            if found.node in (HERE, local) and found.contents.is_file:
                # What lies elsewhere is checked by the ranks.
                rows.check(Path(found.contents.path), one.type, skip_bad=wanted.skip_bad_rows)
    for name, reference in (named or {}).items():
        adapters[name] = origin.find(reference, nodes, local=local, what="adapter")
    return Wants(model, datasets, adapters)


def from_hub(repository: str) -> Wants:
    """A model of the hub's, for ranks that read all else where the recipe says.

    Raises:
        WrongInputError: there is no such model, or it is not what it should be.
        FailedError: it is gated, or the hub cannot be reached.
    """
    from launch import hub_files

    model = hub_files.origin(repository)
    _check_tokenizer(model)
    return Wants(model)


def _check_tokenizer(model: Origin) -> None:
    if not any(name in model.contents.files for name in _TOKENIZERS):
        raise WrongInputError(
            f"{model.contents.path}: no tokenizer in it (tokenizer.json)",
            "copy the tokenizer of the model it came from",
        )


def adapter_elements(adapters: Mapping[str, Origin] | None, layers: int) -> tuple[int, ...]:
    """How many numbers the adapter has for each layer; empty without one.

    Raises:
        WrongInputError: it is none.
    """
    for found in (adapters or {}).values():
        return model_card.adapter_elements_of(found.contents, layers)
    return ()
