"""Where what a recipe names lies: on this machine, on a node of the pair, or on the hub; and what lies there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import FailedError, WrongInputError
from cluster.transport import Transport, shipped
from launch import contents as looking
from launch import hub, model_card, placement, recipe
from launch.contents import Contents
from launch.model_card import ModelCard

HERE = ""  # the machine on which the command runs, where that is no node
_LOOK_SECONDS = 120.0  # a large checkpoint on a slow disk has two hundred headers
_LOOK_LIMIT = 256 << 20


@dataclass(frozen=True)
class Origin:
    """One thing that a recipe names.

    Args:
        reference: as the recipe has it.
        node: whose folder is taken: a node's name, or HERE; None: the hub's.
        contents: what lies there.
        on: the nodes on which the same lies already, and where.
        revision: on the hub, the commit; `checksums` are the SHA-256 of its large files.
    """

    reference: str
    node: str | None
    contents: Contents
    on: Mapping[str, str] = field(default_factory=dict)
    revision: str = ""
    checksums: Mapping[str, str] = field(default_factory=dict)

    def card(self) -> ModelCard:
        """What the model is that lies there.

        Raises:
            WrongInputError, RefusedError: it is none, or not one that can be run.
        """
        return model_card.of_contents(self.contents, self.contents.path)


def find(reference: str, nodes: Sequence[Transport], *, local: str | None, what: str = "model") -> Origin:
    """Where something lies. A folder of this machine comes first, then one of a node, then the hub.

    Args:
        reference: NODE:PATH, an absolute path, or a hub's id.
        nodes: of the pair, head first.
        local: the name of the node that is this machine; None: it is no node.

    Raises:
        WrongInputError: it is nowhere.
        FailedError: a node or the hub cannot be asked.
    """
    if recipe.is_on_node(reference):
        name, _, path = reference.partition(":")
        return _there(reference, name, path, nodes)
    absolute = Path(reference).is_absolute()
    found = _at_once(nodes, reference) if absolute else {}
    here = looking.look(reference) if Path(reference).exists() else None
    if here is not None and local is None:
        chosen, node = Contents.of(here), HERE
    elif found:
        node = local if local in found else next(iter(found))
        chosen = found[node]
    elif hub.is_id(reference) and what == "model":
        from launch import hub_files

        return hub_files.origin(reference)
    else:
        places = " or ".join([*(["here"] if local is None else []), *(f"on {node.name}" for node in nodes)])
        raise WrongInputError(
            f"{reference}: no such {what} {places}",
            "give an absolute path of this machine or of a node; NODE:/PATH says of which",
        )
    alike = {name: seen.path for name, seen in found.items() if placement.same(seen, chosen)}
    return Origin(reference, node, chosen, alike)


def _there(reference: str, name: str, path: str, nodes: Sequence[Transport]) -> Origin:
    node = next((node for node in nodes if node.name == name), None)
    if node is None:
        names = " and ".join(node.name for node in nodes)
        raise WrongInputError(f"{reference}: no node is named {name}", f"the pair's nodes are {names}")
    found = look(node, [path])[0]
    if found is None:
        raise WrongInputError(f"{reference}: {name} has nothing there", "check the path on that node")
    return Origin(reference, name, found, {name: found.path})


def _at_once(nodes: Sequence[Transport], path: str) -> dict[str, Contents]:
    with ThreadPoolExecutor(max(1, len(nodes))) as pool:
        seen = pool.map(lambda node: (node.name, look(node, [path])[0]), nodes)
        return {name: found for name, found in seen if found is not None}


def look(node: Transport, paths: Sequence[str]) -> list[Contents | None]:
    """What lies at paths of a node.

    Raises:
        FailedError: the node cannot be reached, or its answer makes no sense.
    """
    order = shipped.modules(["launch.contents"]) + json.dumps(list(paths)).encode() + b"\n"
    result = node.run(shipped.argv(node.python), stdin=order, timeout=_LOOK_SECONDS, limit=_LOOK_LIMIT)
    _, _, answer = result.stdout.partition(looking.MARK.encode())
    try:
        told = json.loads(answer)
        found = [None if one is None else Contents.of(one) for one in told]
        if len(found) != len(paths):
            raise ValueError(len(found))  # noqa: TRY301 - told like the other ways to make no sense
    except (LookupError, TypeError, ValueError, AttributeError):
        raise FailedError(f"{node.name}: cannot tell what lies on its disk", "does Python work there?") from None
    return found
