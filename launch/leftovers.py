"""What lies on the nodes that nothing refers to any more: found on both at once, and removed when its owner agrees."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.errors import FailedError
from cluster.transport import Transport, shipped
from launch import stock

_SECONDS = 300.0


@dataclass(frozen=True)
class Job:
    """A job's folder on a node; `results` are those of its folders that hold something of worth."""

    name: str
    size: int
    ended: bool
    state: str
    results: tuple[str, ...]
    spec: str


@dataclass(frozen=True)
class Half:
    """A folder that was put on a node for a job to read."""

    name: str
    size: int
    unfinished: bool
    busy: bool


@dataclass(frozen=True)
class Stock:
    """What a node keeps under `home`; `code` is the pair's own."""

    node: str
    home: str
    code: str
    jobs: tuple[Job, ...] = ()
    halves: tuple[Half, ...] = ()
    codes: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, node: str, home: str, told: Mapping[str, Any]) -> Stock:
        """From what launch.stock tells.

        Raises:
            LookupError, TypeError, ValueError: it makes no sense.
        """
        return cls(
            node,
            home,
            str(told["code"]),
            tuple(Job(**{**job, "results": tuple(job["results"])}) for job in told["jobs"]),
            tuple(Half(**half) for half in told["halves"]),
            {str(one["name"]): int(one["size"]) for one in told["codes"]},
            {str(one["name"]): int(one["size"]) for one in told.get("tokens", ())},
        )


@dataclass(frozen=True)
class Leftover:
    """Something that can go: bytes, and why nobody will miss it. `path` is relative to the node's $SPARKCTL_HOME."""

    node: str
    kind: Literal["job", "half", "code", "tokens"]
    path: str
    size: int
    why: str


def leftovers(stocks: Sequence[Stock], *, results: bool = False) -> tuple[Leftover, ...]:
    """What nothing refers to. Pure.

    A job goes when it has ended on every node and left a result on none; with `results`, whenever it has ended. What a job that
    stays names stays too: halves, and jobs whose adapter it serves.
    """
    names = {job.name for stock in stocks for job in stock.jobs}
    going = {name for name in names if _may_go(name, stocks, results=results)}
    kept = [job.spec for stock in stocks for job in stock.jobs if job.name not in going]
    going -= {name for name in going if any(f"/jobs/{name}/" in spec or f'"{name}"' in spec for spec in kept)}
    kept = [job.spec for stock in stocks for job in stock.jobs if job.name not in going]
    running = any(not job.ended for stock in stocks for job in stock.jobs)
    return tuple(found for stock in stocks for found in _of(stock, going, kept, running=running))


def _may_go(name: str, stocks: Sequence[Stock], *, results: bool) -> bool:
    copies = [job for stock in stocks for job in stock.jobs if job.name == name]
    return all(job.ended for job in copies) and (results or not any(job.results for job in copies))


def _of(stock: Stock, going: set[str], kept: Sequence[str], *, running: bool) -> Iterator[Leftover]:
    for job in stock.jobs:
        if job.name in going:
            left = f"its result ({', '.join(job.results)}) goes too" if job.results else "left no result"
            yield Leftover(stock.node, "job", f"jobs/{job.name}", job.size, f"{job.state or 'damaged'}; {left}")
    for half in stock.halves:
        path = f"halves/{half.name}"
        if half.unfinished and not half.busy:
            yield Leftover(stock.node, "half", path, half.size, "a copy that was interrupted")
        elif not half.unfinished and not any(f"{stock.home}/{path}" in spec for spec in kept):
            yield Leftover(stock.node, "half", path, half.size, "no job reads it")
    for name, size in stock.codes.items():
        if stock.code and name != stock.code and not running:
            yield Leftover(stock.node, "code", f"code/{name}", size, "the pair runs another version")
    for name, size in stock.tokens.items():
        if not running:
            yield Leftover(stock.node, "tokens", f"tokens/{name}", size, "a tokenised dataset; made again when needed")


def look(nodes: Sequence[Transport]) -> tuple[Stock, ...]:
    """What the nodes keep.

    Raises:
        FailedError: a node cannot be reached, or does not tell.
    """
    with ThreadPoolExecutor(max(1, len(nodes))) as pool:
        found = list(pool.map(_look, nodes))
    return tuple(found)


def _look(node: Transport) -> Stock:
    home = node.home().sparkctl
    try:
        return Stock.of(node.name, home, _ask(node, "look", home))
    except (LookupError, TypeError, ValueError):
        raise FailedError(f"{node.name}: cannot tell what lies in {home}", "does Python work there?") from None


def remove(nodes: Sequence[Transport], found: Sequence[Leftover]) -> tuple[Leftover, ...]:
    """Remove it; returns what is gone: less where something is in use again.

    Raises:
        FailedError: a node cannot be reached.
    """
    gone: list[Leftover] = []
    for node in nodes:
        own = [one for one in found if one.node == node.name]
        if own:
            done = _ask(node, "remove", node.home().sparkctl, [one.path for one in own])
            gone += [one for one in own if one.path in done]
    return tuple(gone)


def _ask(node: Transport, *order: object) -> Any:
    stdin = shipped.modules(["launch.stock"]) + json.dumps(order).encode() + b"\n"
    result = node.run(shipped.argv(node.python), stdin=stdin, timeout=_SECONDS, limit=64 << 20)
    _, _, answer = result.stdout.partition(stock.MARK.encode())
    try:
        return json.loads(answer)
    except ValueError:
        raise FailedError(f"{node.name}: cannot look at what sparkctl keeps there", "does Python work there?") from None
