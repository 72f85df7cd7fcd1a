"""The pair and its jobs as the command line holds them, wherever the nodes are: this machine, or over SSH, or one of each."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol, Self

from pydantic import ValidationError

from cluster import code, record, transport
from cluster.errors import FailedError, RefusedError, SparkctlError, WrongInputError
from cluster.inventory import Inventory
from cluster.readings.box import Memory
from cluster.record import NodeRecord, PairRecord
from cluster.transport import Transport
from cluster.transport.process import Session
from launch import again, orders
from launch.job import ENDED, JobState, age, pick
from launch.spec import JobSpec

# Seconds. A node that is asked for the first time loads our code.
ANSWER_WITHIN = 60.0


class NodeHandle(Protocol):
    """A node that takes orders (launch.orders)."""

    name: str

    def ask(self, order: str, **arguments: Any) -> dict[str, Any]:
        """Have it done.

        Raises:
            SparkctlError: what the node says; FailedError: it is not to be reached.
        """
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class LocalNode:
    """This machine."""

    def __init__(self, name: str) -> None:
        self.name = name

    def ask(self, order: str, **arguments: Any) -> dict[str, Any]:
        """See NodeHandle.ask."""
        return orders.obey(order, arguments)

    def close(self) -> None:
        """See NodeHandle.close: there is nothing to let go of."""


class RemoteNode:
    """A node over SSH: one program there answers all orders. Where the connection was lost, the next order connects anew."""

    def __init__(self, reached: Transport, known: NodeRecord) -> None:
        self.name = reached.name
        self.transport = reached
        self._known = known
        self._session: Session | None = None
        self._turn = threading.Lock()

    def ask(self, order: str, **arguments: Any) -> dict[str, Any]:
        """See NodeHandle.ask."""
        line = json.dumps([order, arguments]).encode()
        with self._turn:
            if self._session is None or self._session.closed:
                self._session = self.transport.session(self._argv())
            answer = json.loads(self._session.ask(line, timeout=ANSWER_WITHIN))
        if "failed" not in answer:
            return dict(answer["done"])
        kinds: dict[int, type[SparkctlError]] = {2: WrongInputError, 3: RefusedError}
        raise kinds.get(answer["status"], FailedError)(f"{self.name}: {answer['failed']}", answer["fix"])

    def _argv(self) -> list[str]:
        variables = [f"PYTHONPATH={self._known.code}", f"SPARKCTL_HOME={self._known.home}"]
        return ["env", *variables, self._known.python, "-P", "-m", "sparkctl", "orders"]

    def close(self) -> None:
        """See NodeHandle.close."""
        if self._session is not None:
            self._session.close()


@dataclass(frozen=True)
class Row:
    """A job as a node tells of it; of a damaged one only `error`. `memory`: bytes that its ranks hold now, by node."""

    id: str
    node: str
    spec: JobSpec | None
    state: JobState | None
    last: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    memory: Mapping[str, int] = field(default_factory=dict)


class JobHandle:
    """A job, and the nodes that its ranks run on."""

    def __init__(self, spec: JobSpec, nodes: Mapping[str, NodeHandle], folder: str) -> None:
        self.spec = spec
        self.id = spec.id
        self.folder = folder
        self._nodes = nodes

    @property
    def head(self) -> NodeHandle:
        """The node of rank 0, whose agent decides."""
        return self.node_of(0)

    def node_of(self, rank: int) -> NodeHandle:
        """The node of a rank."""
        return self._nodes[self.spec.ranks[rank].node]

    @property
    def nodes(self) -> tuple[NodeHandle, ...]:
        """Every machine that has a folder of the job, the head's first."""
        return tuple(dict.fromkeys(self.node_of(rank.rank) for rank in self.spec.ranks))

    def state(self) -> JobState:
        """Where it stands, as the head knows."""
        return self.look({})[0]

    def look(self, files: Mapping[str, int], rank: int = 0) -> tuple[JobState, dict[str, bytes]]:
        """The state, and what files of the folder hold past these offsets, on the node of a rank."""
        answer = self.node_of(rank).ask("look", id=self.id, files=dict(files))
        pieces = {name: base64.b64decode(piece) for name, piece in answer["files"].items()}
        return JobState.model_validate(answer["state"]), pieces

    def is_supervised(self) -> bool:
        """Whether the head's agent lives."""
        return bool(self.head.ask("look", id=self.id, files={})["supervised"])

    def stop(self, *, now: bool) -> None:
        """Ask for its end. Where the head cannot be reached, the others are asked: their ranks have ended by themselves."""
        try:
            self.head.ask("stop", id=self.id, now=now)
        except FailedError:
            others = self.nodes[1:]
            if not others:
                raise
            for node in others:
                node.ask("stop", id=self.id, now=now)

    def remove(self) -> None:
        """Remove its folder on every node."""
        for node in self.nodes:
            with contextlib.suppress(WrongInputError):  # it has none any more
                node.ask("remove", id=self.id)

    def contents(self, name: str, rank: int = 0) -> dict[str, int]:
        """The files below a folder of the job on the node of a rank: their sizes by path."""
        return dict(self.node_of(rank).ask("contents", id=self.id, name=name)["files"])

    def path(self, name: str) -> str:
        """Something in its folder, on the head."""
        return f"{self.folder}/{name}"


class PairHandle:
    """The inventory's nodes. Connects when something is asked; close it when all is done."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.record: PairRecord | None = None
        self._transports = [transport.to(node) for node in inventory.nodes]
        self.nodes: dict[str, NodeHandle] = {}
        if inventory.embedded:
            here = LocalNode("this machine")
            self.nodes = {node.name: here for node in inventory.nodes}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the nodes."""
        for node in dict.fromkeys(self.nodes.values()):
            node.close()
        for one in self._transports:
            one.close()

    def transport(self, name: str) -> Transport:
        """How a node is reached."""
        return next(one for one in self._transports if one.name == name)

    def connect(self) -> None:
        """Learn what `up` has made: from this machine, or from the head, where somebody else's laptop has run it.

        Raises:
            RefusedError: the nodes are not paired.
            FailedError: the head, which would know, cannot be reached.
        """
        if self.nodes:
            return
        found = record.load(self.inventory) or self._ask_head()
        if found is None:
            names = " and ".join(node.name for node in self.inventory.nodes)
            raise RefusedError(f"{names} are not a pair yet", "`sparkctl up` makes them one")
        self.record = found
        for node, known, reached in zip(self.inventory.nodes, found.nodes, self._transports, strict=True):
            self.nodes[node.name] = LocalNode(node.name) if node.is_local else RemoteNode(reached, known)

    def _ask_head(self) -> PairRecord | None:
        head = self._transports[0]
        try:
            text = head.get(f"{head.home().sparkctl}/{record.NAME}")
            found = PairRecord.model_validate_json(text)
        except (FailedError, ValidationError) as error:
            if isinstance(error, FailedError) and "No such file" not in error.message:
                raise
            return None
        return found if found.is_of(self.inventory) else None

    def refuse_old_code(self) -> None:
        """Refuse to start a job with other code than this machine's.

        Raises:
            RefusedError: the nodes have another version.
        """
        if self.record is not None and self.record.code != code.own().hash:
            raise RefusedError(
                "the nodes have another version of sparkctl than this machine", "`sparkctl up` brings them this one"
            )

    def refuse_bad_link(self) -> None:
        """Refuse a link that was measured and found wanting.

        Raises:
            RefusedError: with what was found.
        """
        if self.record is not None and self.record.link.verdict == "below bar":
            raise RefusedError(
                f"the link is below its bar: {self.record.link.evidence}",
                f"{self.record.link.fix}; or `sparkctl run --force`",
            )

    def boxes(self) -> tuple[dict[str, Memory], dict[str, bool]]:
        """What memory each node has now, and whether it has a GPU. One that does not answer, or is of no pair yet, is left out."""
        try:
            self.connect()
        except SparkctlError:
            return {}, {}
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            told = dict(zip(self.nodes, pool.map(_box, self.nodes.values()), strict=True))
        memories = {name: Memory(**answer["memory"]) for name, answer in told.items() if answer.get("memory")}
        return memories, {name: bool(answer["gpu"]) for name, answer in told.items() if "gpu" in answer}

    def rows(self) -> tuple[list[Row], list[SparkctlError]]:
        """The jobs of both nodes, oldest first, each as the node of its rank 0 tells; and what went wrong with asking."""
        self.connect()
        nodes = list(dict.fromkeys(self.nodes.values()))
        rows: dict[str, Row] = {}
        errors: list[SparkctlError] = []
        with ThreadPoolExecutor(len(nodes)) as pool:
            for node, answer in zip(nodes, pool.map(_listed, nodes), strict=True):
                if isinstance(answer, SparkctlError):
                    errors.append(answer)
                    continue
                for row in (_row(node.name, told) for told in answer):
                    before = rows.get(row.id, row)
                    kept = row if _decides(row) else before
                    rows[row.id] = replace(kept, memory={**before.memory, **row.memory})
        return sorted(rows.values(), key=lambda row: row.spec.created if row.spec else ""), errors

    def find(self, given: str) -> JobHandle:
        """The job whose id is `given`, or the only one whose id starts or ends so.

        Raises:
            WrongInputError: no job, or several, fit.
            FailedError: a node that may know it cannot be reached.
        """
        rows, errors = self.rows()
        known = {row.id: row for row in rows}
        if errors and not any(given in id for id in known):
            raise errors[0]
        return self._handle(known[pick(list(known), given)])

    def _handle(self, row: Row) -> JobHandle:
        if row.spec is None:
            raise FailedError(row.error, "the job's folder is damaged; remove it")
        return self.job(row.spec)

    def job(self, spec: JobSpec, folder: str | None = None) -> JobHandle:
        """A job of this pair.

        Raises:
            RefusedError: its nodes are not the inventory's.
        """
        strangers = [rank.node for rank in spec.ranks if rank.node not in self.nodes]
        if strangers:
            raise RefusedError(
                f"job {spec.id} runs on {strangers[0]}, which the inventory does not have", "name its inventory with -i"
            )
        return JobHandle(spec, self.nodes, folder or self._folder(spec))

    def _folder(self, spec: JobSpec) -> str:
        from launch import job

        if self.record is None:
            return str(job.home() / "jobs" / spec.id)
        known = next(one for one in self.record.nodes if one.name == spec.ranks[0].node)
        return f"{known.home}/jobs/{spec.id}"

    def launch(self, spec: JobSpec, key: str, secrets: Mapping[str, str]) -> JobHandle:
        """Make the job's folder on each of its nodes, then start their agents, the peer's first. All of it, or nothing stays."""
        spec = spec.model_copy(update={"code": code.own().hash, "model": again.model_of(spec.ranks[0].model)})
        made = self.job(spec)
        started: list[NodeHandle] = []
        try:
            for node, name in _with_names(made):
                started.append(node)
                node.ask("create", spec=spec.model_dump(mode="json"), key=key, node=name)
            for node, _ in reversed(_with_names(made)):
                node.ask("start", id=spec.id, secrets=dict(secrets), unit=not self.inventory.embedded)
        except BaseException:
            for node in started:
                with contextlib.suppress(SparkctlError):
                    node.ask("stop", id=spec.id, now=True)
                    node.ask("remove", id=spec.id)
            raise
        return made


def _with_names(made: JobHandle) -> list[tuple[NodeHandle, str]]:
    """The machines of a job, each with the name of the first of its ranks' nodes."""
    found: dict[NodeHandle, str] = {}
    for rank in made.spec.ranks:
        found.setdefault(made.node_of(rank.rank), rank.node)
    return list(found.items())


def _box(node: NodeHandle) -> dict[str, Any]:
    try:
        return node.ask("memory")
    except SparkctlError:
        return {}


def _listed(node: NodeHandle) -> Sequence[Mapping[str, Any]] | SparkctlError:
    try:
        jobs: Sequence[Mapping[str, Any]] = node.ask("list")["jobs"]
    except SparkctlError as error:
        return error
    return jobs


def _row(node: str, told: Mapping[str, Any]) -> Row:
    if "error" in told:
        return Row(told["id"], node, None, None, error=told["error"])
    return Row(
        told["id"],
        node,
        JobSpec.model_validate(told["spec"]),
        JobState.model_validate(told["state"]),
        told["last"],
        memory={node: told["memory"]} if "memory" in told else {},
    )


def _decides(row: Row) -> bool:
    """Whether the node that tells is the one whose agent decides."""
    return row.spec is not None and row.spec.ranks[0].node == row.node


def is_recent(row: Row, seconds: float = 86400) -> bool:
    """Whether a job runs, or ended not longer ago than that; a damaged one counts."""
    return row.state is None or row.state.state not in ENDED or age(row.state.updated) < seconds
