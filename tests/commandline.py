"""The real command line in a home of its own, and one fine-tune over two ranks that all tests of this process look at."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launch.job import JobFolder
from tests import models

INVENTORY = """
nodes:
  - {name: left, transport: local}
  - {name: right, transport: local}
env: {OMP_NUM_THREADS: 1, CUDA_VISIBLE_DEVICES: "", INVENTORY_SAYS: hello, INVENTORY_TOKEN: for-the-ranks}
"""
RECIPE = """
kind: finetune
name: tiny
base_model: ./model
datasets: [{path: rows.jsonl, type: qa}]
val_set_size: 4
adapter: lora
lora_r: 4
sequence_len: 64
micro_batch_size: 2
gradient_accumulation_steps: 4
max_steps: 12
eval_steps: 6
learning_rate: 0.005
warmup_ratio: 0.1
strategy: pipeline
"""
# What stands on PYTHONPATH before ours: ROS 2 has a `launch`, and anybody may have a `cluster`.
STRANGERS = ("launch", "cluster")
# What the owner's shell may hold and no rank may see.
SHELL_SECRETS = {
    "HF_TOKEN": "hf_of_the_owner",
    "HUGGING_FACE_HUB_TOKEN": "hf_of_the_owner",
    "AWS_SECRET_ACCESS_KEY": "of-the-owner",
    "MY_PASSWORD": "of-the-owner",
}


class CommandLine:
    """`sparkctl`, as a user types it, in `folder`: its home, its inventory, a recipe, the data and the model lie there."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.strangers = folder / "strangers"
        (folder / "pair.yaml").write_text(INVENTORY)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COLUMNS")},
            "SPARKCTL_HOME": str(self.home),
            "SPARKCTL_INVENTORY": str(folder / "pair.yaml"),
            **environment,
        }

    def argv(self, *arguments: str) -> list[str]:
        """The command line as a program call."""
        return [sys.executable, "-m", "sparkctl", *arguments]

    def __call__(self, *arguments: str, seconds: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.argv(*arguments),
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Start it in a session of its own, as a terminal would; ended at the latest when the block is left."""
        process = subprocess.Popen(
            self.argv(*arguments),
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def detach(self, *arguments: str) -> JobFolder:
        """Start a job and return its folder."""
        done = self("run", "--detach", *arguments)
        assert done.returncode == 0, done.stderr
        return JobFolder(self.home / "jobs" / done.stdout.strip())

    def jobs(self) -> list[JobFolder]:
        """The folders of its jobs, oldest first."""
        folders = [JobFolder(file.parent) for file in self.home.glob("jobs/[!.]*/spec.json")]
        return sorted(folders, key=lambda job: job.spec_file.stat().st_mtime_ns)

    def end_all(self) -> None:
        """End what its jobs still run, by number."""
        for job in self.jobs():
            for pid in pids(job):
                with suppress(psutil.NoSuchProcess):
                    process = psutil.Process(pid)
                    if str(job.path) in process.cmdline():
                        process.kill()

    def equip(self, **changes: Any) -> CommandLine:
        """Make the model, the data and the recipe; `changes` are keys of the recipe."""
        models.make(self.folder / "model")
        (self.folder / "rows.jsonl").write_text("".join(rows()))
        lines = [line for line in RECIPE.strip().splitlines() if line.split(":")[0] not in changes]
        (self.folder / "tiny.yaml").write_text(
            "\n".join([*lines, *(f"{k}: {json.dumps(v)}" for k, v in changes.items())])
        )
        for name in STRANGERS:
            (self.strangers / name).mkdir(parents=True)
            (self.strangers / name / "__init__.py").write_text("raise ImportError('a stranger was imported')\n")
        return self


def rows() -> Iterator[str]:
    """The lines of a small dataset with answers of many lengths."""
    for number in range(24):
        yield json.dumps({"question": f"What is {number}?", "answer": f"{number} and " + "x" * (number % 7)}) + "\n"


def pids(job: JobFolder) -> list[int]:
    """The processes that the job's state names, the agent first."""
    state = job.state()
    return [pid for pid in (state.agent_pid, *state.rank_pids.values()) if pid is not None]


def gone(pid: int) -> bool:
    """Whether no such process runs; one that nobody has waited for counts as gone."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_for(condition: Callable[[], Any], seconds: float = 180) -> Any:
    """Poll until `condition` holds; returns what it gave."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise TimeoutError(f"not within {seconds:g} s")


def metrics(job: JobFolder) -> list[dict[str, Any]]:
    """The complete lines of its metrics.jsonl."""
    text = job.metrics.read_text() if job.metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(job: JobFolder) -> list[float]:
    """The loss of each logged training step."""
    return [entry["loss"] for entry in metrics(job) if "loss" in entry]


@dataclass
class Watched:
    """A finished job, and what was seen while it ran."""

    commands: CommandLine
    job: JobFolder
    detached: subprocess.CompletedProcess[str]
    states: list[str] = field(default_factory=list)
    listening: set[tuple[int, str]] = field(default_factory=set)  # (process, address)
    environments: dict[int, dict[str, str]] = field(default_factory=dict)  # by rank
    processes: list[int] = field(default_factory=list)


@functools.cache
def finished() -> Watched:
    """A fine-tune over two ranks, with strangers first on PYTHONPATH and secrets in the shell; run once, when first asked for."""
    folder = Path(tempfile.mkdtemp(prefix="sparkctl-tests-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    commands = CommandLine(folder, **SHELL_SECRETS).equip()
    commands.environment["PYTHONPATH"] = str(commands.strangers)
    detached = commands("run", "--detach", "tiny.yaml")
    assert detached.returncode == 0, detached.stderr
    seen = Watched(commands, JobFolder(commands.home / "jobs" / detached.stdout.strip()), detached)
    atexit.register(commands.end_all)
    wait_for(lambda: _watch(seen).ended)
    return seen


def _watch(seen: Watched) -> Any:
    state = seen.job.state()
    seen.states += [state.state] if state.state not in seen.states else []
    seen.processes = pids(seen.job)
    for pid in seen.processes:
        with suppress(psutil.NoSuchProcess):
            for connection in psutil.Process(pid).net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    seen.listening.add((pid, connection.laddr.ip))
    for rank, pid in state.rank_pids.items():
        with suppress(psutil.NoSuchProcess):
            seen.environments[rank] = psutil.Process(pid).environ() or seen.environments.get(rank, {})
    return state
