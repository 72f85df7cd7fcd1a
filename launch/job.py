"""A job: its id, its spec, its states, and its folder on a node. Read and written by the command line, the agent and the ranks."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import FailedError, RefusedError, WrongInputError
from cluster.files import write_atomically
from launch.spec import EndSpec, JobSpec, LinkSpec, RankSpec

__all__ = [
    "ENDED",
    "EndSpec",
    "JobFolder",
    "JobSpec",
    "JobState",
    "LinkSpec",
    "RankSpec",
    "StateName",
    "age",
    "create",
    "folders",
    "home",
    "last_metrics",
    "new_id",
    "pick",
]

M = TypeVar("M", bound=BaseModel)

StateName = Literal["staging", "starting", "running", "ready", "succeeded", "failed", "stopped"]
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "stopped"})

# Seconds. An agent starts in half a second; a machine under load may take a while.
AGENT_WITHIN = 30.0
# Whoever looks whether an agent is alive holds its lock for a moment.
LOCK_WITHIN = 1.0
# A folder is made in milliseconds; one that is unfinished for longer was left by a program that was killed.
UNFINISHED_FOR = 60.0
_UNFINISHED = ".new"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class JobState(_Frozen):
    """Where a job stands, as its agent last wrote it.

    Of a failed job, `failed_rank` is the rank that caused it, if one did; with `wrong_input` its owner must change something.
    `warning`: what slows it down while it runs.
    `first`: the attempt from which restarts are counted: 1, or that of the last `resume`.
    """

    state: StateName
    attempt: int = 1
    first: int = 1
    reason: str = ""
    fix: str = ""
    warning: str = ""
    failed_rank: int | None = None
    wrong_input: bool = False
    agent_pid: int | None = None
    rank_pids: dict[int, int] = {}
    updated: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing of the job runs any more."""
        return self.state in ENDED


class JobFolder:
    """`$SPARKCTL_HOME/jobs/ID`: the one place where a job's files lie on a node."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec_file = path / "spec.json"
        self.state_file = path / "state.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.answers = path / "answers.jsonl"
        self.agent_log = path / "agent.log"
        self.key_file = path / "key"
        self.node_file = path / "node"
        self.stop_file = path / "stop"
        self.secrets_pipe = path / "secrets"
        self.events = path / "events.jsonl"
        self._lock_file = path / "agent.lock"

    @property
    def id(self) -> str:
        """The job's id, which is the folder's name."""
        return self.path.name

    def log(self, rank: int) -> Path:
        """What the rank printed, standard output and error together."""
        return self.path / f"rank{rank}.log"

    def spec(self) -> JobSpec:
        """The job as it was planned.

        Raises:
            FailedError: the file is missing or damaged.
        """
        return self._load(self.spec_file, JobSpec)

    def node(self) -> str:
        """The name of the node that this folder lies on."""
        return self.node_file.read_text(encoding="utf-8").strip()

    def ask_to_stop(self, *, now: bool) -> None:
        """Have the agent stop the job: in good order, or at once."""
        write_atomically(self.stop_file, b"now" if now else b"gently")

    def go_on(self, attempt: int) -> None:
        """Make a job that has ended one that is about to start, with this attempt.

        Raises:
            RefusedError: an agent still looks after it.
        """
        if self.supervised():
            raise RefusedError(
                f"job {self.id} has an agent on {self.node()} still", "wait a moment, or `sparkctl stop` it"
            )
        self.stop_file.unlink(missing_ok=True)
        self.write_state(JobState(state="staging", attempt=attempt, first=attempt))

    def stop_asked(self) -> Literal["now", "gently"] | None:
        """What `ask_to_stop` has asked, if it has."""
        try:
            return "now" if self.stop_file.read_bytes() == b"now" else "gently"
        except FileNotFoundError:
            return None

    def key(self) -> str:
        """What whoever talks to the job must prove to know: in no spec, no argv and no log.

        Raises:
            FailedError: the file is missing.
        """
        try:
            return self.key_file.read_text(encoding="ascii").strip()
        except OSError as error:
            raise FailedError(
                f"{self.key_file}: cannot be read ({type(error).__name__})", "the job's folder is damaged; remove it"
            ) from None

    def state(self) -> JobState:
        """Where the job stands. A job whose agent is gone without a word, or never came, counts as failed."""
        written = self._load(self.state_file, JobState)
        coming = written.state == "staging" and age(written.updated) < AGENT_WITHIN
        if written.ended or coming or self.supervised():
            return written
        written = self._load(self.state_file, JobState)  # the agent may have ended, and said so, between the two looks
        if written.ended:
            return written
        return written.model_copy(
            update={
                "state": "failed",
                "reason": "its agent "
                + ("never started" if written.state == "staging" else "is gone without having said why"),
                "fix": f"look at {self.agent_log}",
            }
        )

    def written(self) -> JobState:
        """What an agent last wrote, whether it lives or not.

        Raises:
            FailedError: the file is missing or damaged.
        """
        return self._load(self.state_file, JobState)

    def write_state(self, state: JobState) -> None:
        """Replace the state file in one step."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        write_atomically(self.state_file, state.model_copy(update={"updated": now}).model_dump_json(indent=1).encode())

    @contextmanager
    def supervising(self) -> Iterator[None]:
        """Hold the agent's lock, which the kernel gives up when the agent dies, however it dies."""
        with self._lock_file.open("ab") as file:
            deadline = time.monotonic() + LOCK_WITHIN
            while not _lock(file, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise FailedError(f"job {self.id} has an agent already", "`sparkctl jobs` shows its state")
                time.sleep(0.02)
            yield

    def supervised(self) -> bool:
        """Whether an agent is alive for this job."""
        try:
            with self._lock_file.open("rb") as file:
                return not _lock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    @staticmethod
    def _load(path: Path, model: type[M]) -> M:
        try:
            return model.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise FailedError(
                f"{path}: cannot be read ({type(error).__name__})", "the job's folder is damaged; remove it"
            ) from None


def home() -> Path:
    """`$SPARKCTL_HOME`, else ~/.sparkctl: for the owner's eyes only, made on first use."""
    path = Path(os.environ.get("SPARKCTL_HOME") or "~/.sparkctl").expanduser().absolute()
    return _private(path)


def new_id(name: str, taken: Collection[str]) -> str:
    """A job id: the recipe's name and four hex digits, none of those that are taken."""
    while True:
        candidate = f"{name}-{secrets.token_hex(2)}"
        if candidate not in taken:
            return candidate


def create(spec: JobSpec, key: str | None = None, node: str | None = None) -> JobFolder:
    """Make the job's folder on `node` (else rank 0's): complete, or not at all. Without a `key` the job gets a new one."""
    jobs = _private(home() / "jobs")
    _sweep(jobs)
    unfinished = jobs / f".{spec.id}{_UNFINISHED}"
    unfinished.mkdir(mode=0o700)
    try:
        draft = JobFolder(unfinished)
        write_atomically(draft.spec_file, spec.model_dump_json(indent=1).encode())
        write_atomically(draft.key_file, (key or secrets.token_urlsafe(32)).encode() + b"\n")
        write_atomically(draft.node_file, (node or spec.ranks[0].node).encode())
        draft.write_state(JobState(state="staging"))
        unfinished.rename(jobs / spec.id)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return JobFolder(jobs / spec.id)


def folders() -> list[JobFolder]:
    """The jobs of this node, oldest first."""
    jobs = home() / "jobs"
    found = [
        JobFolder(path) for path in jobs.glob("*/") if not path.name.startswith(".") and (path / "spec.json").is_file()
    ]
    return sorted(found, key=lambda folder: (folder.spec_file.stat().st_mtime_ns, folder.id))


def pick(ids: Sequence[str], given: str) -> str:
    """The id that is `given`, or the only one that starts or ends so.

    Raises:
        WrongInputError: none, or several, fit.
    """
    exact = [id for id in ids if id == given]
    fitting = exact or [id for id in ids if id.startswith(given) or id.endswith(f"-{given}")]
    if not fitting:
        raise WrongInputError(f"{given}: no such job", "`sparkctl jobs --all` lists them")
    if len(fitting) > 1:
        raise WrongInputError(f"{given}: fits {len(fitting)} jobs: {', '.join(fitting[-5:])}", "give more of the id")
    return fitting[0]


def last_metrics(folder: JobFolder) -> dict[str, Any]:
    """The newest logged training step, or nothing; evaluations between the steps are passed over."""
    try:
        lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    steps = (dict(json.loads(line)) for line in reversed(lines) if line.endswith("}"))  # the last may be half written
    return next((step for step in steps if "loss" in step), {})


def age(stamp: str) -> float:
    """Seconds since an ISO 8601 time."""
    return (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()


def _private(path: Path) -> Path:
    """A folder for the owner's eyes only, made on first use."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FailedError(
            f"{path}: cannot be made ({error.strerror})", "set $SPARKCTL_HOME to a folder of yours"
        ) from None
    return path


def _sweep(jobs: Path) -> None:
    """Remove what programs that were killed left unfinished."""
    for path in jobs.glob(f".*{_UNFINISHED}"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > UNFINISHED_FOR:
                shutil.rmtree(path)


def _lock(file: IO[bytes], kind: int) -> bool:
    """Whether the lock could be taken at once; it is given up when the file is closed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
