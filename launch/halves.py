"""Everything that a recipe names, put where each rank can read it: on its own node, and of a model no more than its half.

What is made lies under $SPARKCTL_HOME/halves on the node, in folders named by their content, so that a second run finds them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from cluster import transfer
from cluster.errors import FailedError
from cluster.record import PairRecord
from cluster.transfer import End, Helper, Watch
from cluster.transfer.manifest import Manifest
from cluster.transport import Transport
from cluster.transport.local import LocalTransport
from launch import hub_files, placement
from launch.origin import HERE, Origin
from launch.placement import Placement
from launch.split import Cut, whole

FOLDER = "halves"


@dataclass(frozen=True)
class Site:
    """A node that files go to: reached how, at which addresses of the link, and with our code where (empty: as it is here)."""

    end: End
    code: str = ""

    @property
    def name(self) -> str:
        """The node's name."""
        return self.end.transport.name

    @property
    def transport(self) -> Transport:
        """How it is reached."""
        return self.end.transport

    def fetcher(self) -> list[str]:
        """The command that fetches from the hub there."""
        # Whoever started it has asked the hub already: what the node's own environment says of that does not count.
        path = [f"PYTHONPATH={self.code}"] if self.code else []
        return [
            "env",
            "HF_HUB_OFFLINE=0",
            "HF_HUB_DISABLE_TELEMETRY=1",
            *path,
            self.end.python or sys.executable,
            "-P",
            "-m",
            "sparkctl",
            "fetch",
        ]


def sites(record: PairRecord, transports: Sequence[Transport]) -> tuple[Site, ...]:
    """The nodes of a pair that `up` has made, head first."""
    return tuple(
        Site(
            End(
                transport,
                tuple(str(rail.ends[rank].address.ip) for rail in record.rails),
                record.nodes[rank].python,
            ),
            record.nodes[rank].code,
        )
        for rank, transport in enumerate(transports)
    )


@dataclass(frozen=True)
class Wants:
    """What the recipe names: the model, and what travels whole; each adapter under the name that the recipe gives it."""

    model: Origin
    datasets: tuple[Origin, ...] = ()
    adapters: Mapping[str, Origin] | None = None


@dataclass(frozen=True)
class Placed:
    """Where it lies on one node."""

    model: str
    datasets: tuple[str, ...]
    adapters: dict[str, str]


def place(wants: Wants, cuts: Mapping[str, Cut], nodes: Sequence[Site], watch: Watch) -> dict[str, Placed]:
    """Have each node hold what its rank reads; what is there already is not copied again.

    Args:
        cuts: the layers of the rank on each node, by the node's name.
        nodes: both nodes of the pair: one may give what only the other runs.
        watch: told of each transfer's progress, by several threads.

    Raises:
        RefusedError: a node has not the room.
        FailedError: a node, the link, the source or the hub was lost; what has arrived is kept for the next attempt.
    """
    targets = [site for site in nodes if site.name in cuts]
    with ThreadPoolExecutor(max(1, len(targets))) as pool:
        made = list(pool.map(lambda site: _on(site, wants, cuts[site.name], nodes, watch), targets))
    return {site.name: placed for site, placed in zip(targets, made, strict=True)}


def fetch_here(model: Origin, layers: int, node: str, watch: Watch) -> str:
    """Have all of a model of the hub's lie on this machine; returns the folder.

    Raises:
        RefusedError: this machine has not the room.
        FailedError: the hub was lost; what has arrived is kept for the next attempt.
    """
    site = Site(End(LocalTransport(node), ()))
    return _one(site, model, lambda: placement.of_model(model.contents, whole(layers), model.checksums), (), watch)


def _on(site: Site, wants: Wants, cut: Cut, nodes: Sequence[Site], watch: Watch) -> Placed:
    model = _one(
        site, wants.model, lambda: placement.of_model(wants.model.contents, cut, wants.model.checksums), nodes, watch
    )
    small = {
        origin.reference: _one(site, origin, lambda origin=origin: placement.of_files(origin.contents), nodes, watch)  # type: ignore[misc]
        for origin in (*wants.datasets, *(wants.adapters or {}).values())
    }
    return Placed(
        model,
        tuple(small[origin.reference] for origin in wants.datasets),
        {name: small[origin.reference] for name, origin in (wants.adapters or {}).items()},
    )


def _one(site: Site, origin: Origin, placed: Callable[[], Placement], nodes: Sequence[Site], watch: Watch) -> str:
    """Have one thing lie on a node; returns where."""
    if site.name in origin.on:
        return origin.on[site.name]
    made = placed()
    final = str(PurePosixPath(site.transport.home().sparkctl) / FOLDER / made.name)
    _carry(site, origin, final, made.manifest, nodes, watch)
    return f"{final}/{PurePosixPath(origin.contents.path).name}" if origin.contents.is_file else final


def _carry(site: Site, origin: Origin, final: str, manifest: Manifest, nodes: Sequence[Site], watch: Watch) -> None:
    path = PurePosixPath(origin.contents.path)
    root = str(path.parent if origin.contents.is_file else path)
    if origin.node is None:
        _from_hub(site, origin, final, manifest, watch)
    elif origin.node == HERE:
        transfer.from_here(root, site.transport, final, manifest, watch)
    else:
        source = next(node for node in nodes if node.name == origin.node)
        transfer.over_link(source.end, root, site.end, final, manifest, watch)


def _from_hub(site: Site, origin: Origin, final: str, manifest: Manifest, watch: Watch) -> None:
    with Helper(site.transport, site.fetcher()) as taking:
        told = taking.ask(
            "fetch",
            final=final,
            manifest=manifest.to_json(),
            repository=origin.reference,
            revision=origin.revision,
            endpoint=hub_files.endpoint(),
            token=hub_files.token(),
        )
        told = transfer.followed(taking, told, watch, "from the hub", ())
    if told["state"] == "done":
        return
    error = transfer.failure(site.name, final, told)
    if told["kind"] in ("source", "lost"):
        error = FailedError(
            error.message,
            "can the node reach the hub? Else `hf download` it on another machine, and give `base_model` that folder",
        )
    raise error
