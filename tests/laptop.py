"""A laptop and the pair that it has made: two simulated Sparks after `sparkctl up`, shared by all tests of a session.

A test finds the pair well and leaves it so: both hosts on, cables in, no job running. `shared` is a folder that hosts and laptop
see in the same place; the hosts cannot write there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import inventory, pairing, transport
from cluster.transport.sudo import Sudo
from launch.job import JobState
from tests import models
from tests.commandline import RECIPE, rows
from tests.lab import Host, Lab, eventually

# Of a machine that only tests on two cores: the ranks' threads would wait for one another.
ENV = "env: {OMP_NUM_THREADS: 1, PAIR_SAYS: hello, PAIR_TOKEN: for-the-ranks}\n"


class Laptop:
    """`sparkctl` as its owner types it, in the folder `shared`."""

    def __init__(self, lab: Lab, shared: Path) -> None:
        self.lab = lab
        self.shared = shared
        self.head, self.peer = lab.hosts
        self.inventory = lab.home / "pair.yaml"
        python = f"python: {sys.prefix}/bin/python, identity_file"
        self.inventory.write_text(lab.inventory().replace("identity_file", python) + ENV)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COLUMNS")},
            "HOME": str(lab.home),
            "SPARKCTL_INVENTORY": str(self.inventory),
        }
        for name in ("SPARKCTL_HOME", "SSH_AUTH_SOCK"):
            self.environment.pop(name, None)

    def argv(self, *arguments: str) -> list[str]:
        """The command line as a program call."""
        return [sys.executable, "-m", "sparkctl", *arguments]

    def __call__(self, *arguments: str, seconds: float = 150, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.argv(*arguments),
            cwd=self.shared,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Start it in a session of its own; ended at the latest when the block is left."""
        process = subprocess.Popen(
            self.argv(*arguments),
            cwd=self.shared,
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

    def detach(self, *arguments: str) -> str:
        """Start a job; its id."""
        done = self("run", "--detach", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def recipe(self, name: str, **changes: Any) -> str:
        """Write the small fine-tune of the tests as NAME.yaml, with other keys; returns the file's name."""
        lines = [line for line in RECIPE.strip().splitlines() if line.split(":")[0] not in (*changes, "name")]
        given = {"name": name} | {key: value for key, value in changes.items() if value is not None}
        text = "\n".join([*lines, *(f"{key}: {json.dumps(value)}" for key, value in given.items())])
        (self.shared / f"{name}.yaml").write_text(text + "\n")
        return f"{name}.yaml"

    # What lies on the hosts.

    def folder(self, host: Host, job: str) -> str:
        """A job's folder on a host."""
        return f"{host.home}/.sparkctl/jobs/{job}"

    def read(self, host: Host, job: str, name: str) -> bytes:
        """A file of a job on a host; empty where it is not there."""
        done = host.run(["cat", f"{self.folder(host, job)}/{name}"], check=False, text=False)
        content: bytes = done.stdout
        return content

    def state(self, host: Host, job: str) -> JobState | None:
        """What the agent of a host last wrote of a job."""
        content = self.read(host, job, "state.json")
        return JobState.model_validate_json(content) if content else None

    def metrics(self, job: str) -> list[dict[str, Any]]:
        """The complete lines of a job's metrics.jsonl, of each step the last: a restart may have gone back some."""
        lines = self.read(self.head, job, "metrics.jsonl").decode().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self, job: str) -> list[float]:
        """The loss of each training step; where a restart took one again, the later."""
        return list({entry["step"]: entry["loss"] for entry in self.metrics(job) if "loss" in entry}.values())

    def until(self, true: Any, seconds: float, what: str) -> None:
        """Ask again and again, not so often that the hosts do nothing else."""

        def slowly() -> bool:
            if true():
                return True
            time.sleep(0.2)
            return False

        eventually(slowly, seconds, what)

    def remains(self) -> list[str]:
        """Processes of jobs on either host: empty when nothing is left."""
        return [
            f"{host.name}: {' '.join(process.argv)}"
            for host in self.lab.hosts
            if host.on
            for process in host.processes()
            if "sparkctl" in process.argv and {"agent", "worker"} & set(process.argv)
        ]


@contextmanager
def laptop_with_pair(shared: Path, **options: Any) -> Iterator[Laptop]:
    """Boot a pair, `sparkctl up` it, and put a tiny model and its data into `shared`. `options` are Lab's."""
    if missing := Lab.missing():
        (pytest.skip if os.geteuid() else pytest.fail)(missing)
    shared.chmod(0o755)
    bind = [sys.prefix, shared, *options.pop("bind", ())]
    with Lab(bind=bind, **options) as lab:
        for host in lab.hosts:
            eventually(lambda host=host: "default" in host.run(["ip", "-4", "route"]).stdout, 20, "the default route")
        laptop = Laptop(lab, shared)
        models.make(shared / "model")
        (shared / "rows.jsonl").write_text("".join(rows()))
        for path in (shared / "model").iterdir():  # safetensors writes for its owner alone
            path.chmod(0o644)
        pair_up(laptop)
        yield laptop


class _Approving:
    """Answers `up` as somebody in a hurry does."""

    def accept(self, unknown: object) -> bool:
        return False

    def mend(self, left: object) -> bool:
        return True

    def approve(self, proposal: object) -> bool:
        return True

    def tell(self, node: str, said: str) -> None:
        pass


def pair_up(laptop: Laptop) -> None:
    """`sparkctl up`, but for the measurement of the link, which takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(laptop.lab.home))
        patch.delenv("SPARKCTL_HOME", raising=False)
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        pair = inventory.load(laptop.inventory)
        transports = [transport.to(node) for node in pair.nodes]
        try:
            assert pairing.up(pair, transports, _Approving(), sudo=Sudo(), seconds=None) is not None
        finally:
            for one in transports:
                one.close()
