"""What an agent does when things go wrong: no rank is left, the state says why, and who waits is told."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from launch.job import JobFolder
from tests.commandline import CommandLine, gone, losses, pids, wait_for

pytestmark = pytest.mark.timeout(300)

# How long both sides may take to be down after a failure; what a loaded test machine adds comes on top.
WITHIN, SLACK = 10.0, 5.0


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """A command line with a recipe that goes on for longer than any test."""
    made = CommandLine(tmp_path_factory.mktemp("agent")).equip(max_steps=100_000, eval_steps=None, restart={"max": 0})
    yield made
    made.end_all()


def _training(job: JobFolder) -> JobFolder:
    """Wait until the job takes steps."""
    wait_for(lambda: len(losses(job)) >= 2 or job.state().ended)
    assert job.state().state == "running", job.state()
    return job


def _new(commands: CommandLine, before: list[JobFolder]) -> JobFolder:
    """Wait for a job that was not among those before."""
    known = {job.id for job in before}
    found = wait_for(lambda: [job for job in commands.jobs() if job.id not in known])
    assert isinstance(found[0], JobFolder)
    return found[0]


def _kill_and_wait(job: JobFolder, pid: int) -> None:
    """Kill one process of the job; all of them must be gone in time."""
    running = pids(job)
    os.kill(pid, signal.SIGKILL)
    since = time.monotonic()
    wait_for(lambda: all(gone(other) for other in running), WITHIN + SLACK)
    assert time.monotonic() - since < WITHIN + SLACK


def test_a_killed_rank_ends_the_other_and_who_follows_is_told(commands: CommandLine) -> None:
    before = commands.jobs()
    with commands.started("run", "tiny.yaml") as process:
        job = _training(_new(commands, before))
        _kill_and_wait(job, job.state().rank_pids[1])
        _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    *last_lines, error, fix = told.splitlines()
    assert last_lines == ["  rank 1 | node right holds layers 2-3 + head on cpu"]
    assert error == f"error: job {job.id} failed: rank 1 (node right) was ended by SIGKILL"
    assert fix.endswith(f"sparkctl logs {job.id} --rank 1")
    assert (job.state().state, job.state().failed_rank) == ("failed", 1)


def test_a_killed_head_ends_its_peer(commands: CommandLine) -> None:
    job = _training(commands.detach("tiny.yaml"))
    _kill_and_wait(job, job.state().rank_pids[0])
    state = job.state()
    assert (state.state, state.failed_rank) == ("failed", 0)
    assert state.reason == "rank 0 (node left) was ended by SIGKILL"


def test_ranks_do_not_outlive_a_killed_agent(commands: CommandLine) -> None:
    job = _training(commands.detach("tiny.yaml"))
    agent = job.state().agent_pid
    assert agent is not None
    _kill_and_wait(job, agent)
    row = next(row for row in json.loads(commands("jobs", "--json").stdout) if row["id"] == job.id)
    assert (row["state"], row["reason"]) == ("failed", "its agent is gone without having said why")


def test_ctrl_c_detaches_and_the_job_goes_on_until_it_is_stopped(commands: CommandLine) -> None:
    before = commands.jobs()
    with commands.started("run", "tiny.yaml") as process:
        job = _training(_new(commands, before))
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of its foreground group
        _, told = process.communicate(timeout=30)
    assert process.returncode == 0
    assert told.splitlines() == [
        "",
        f"detached; the job goes on. sparkctl logs -f {job.id} | sparkctl stop {job.id}",
    ]
    steps = len(losses(job))
    wait_for(lambda: len(losses(job)) > steps + 1)
    running = pids(job)
    with commands.started("logs", "-f", job.id) as follower:
        stopped = commands("stop", job.id[-4:])
        shown, _ = follower.communicate(timeout=30)
    assert (stopped.returncode, stopped.stdout) == (0, f"job {job.id}: stopped\n")
    assert follower.returncode == 0
    assert "rank 1 | node right holds layers 2-3 + head on cpu" in shown.splitlines()
    wait_for(lambda: all(gone(pid) for pid in running))  # the agent lets go of the job a moment before it is gone
    assert (job.state().state, job.state().reason) == ("stopped", "stopped on request")
    again = commands("stop", job.id)
    assert (again.returncode, again.stdout) == (0, f"job {job.id} has ended already: stopped\n")


def test_a_checkpoint_that_lacks_a_tensor_is_told_and_hangs_nobody(commands: CommandLine) -> None:
    path = commands.folder / "model" / "model.safetensors"
    whole = path.read_bytes()
    missing = "model.layers.3.mlp.up_proj.weight"
    try:
        tensors = load_file(path)
        del tensors[missing]
        save_file(tensors, path, metadata={"format": "pt"})
        done = commands("run", "tiny.yaml")
    finally:
        path.write_bytes(whole)
    job = commands.jobs()[-1]
    assert done.returncode == 2
    error, fix = done.stderr.splitlines()
    assert error.startswith(
        f"error: job {job.id} failed: {commands.folder}/model: 1 tensors of layers 2-3 + head are not in"
    )
    assert error.endswith(missing)
    assert fix.startswith("  try: download the model again")
    assert (job.state().state, job.state().failed_rank, job.state().wrong_input) == ("failed", 1, True)
    wait_for(lambda: all(gone(pid) for pid in pids(job)), WITHIN + SLACK)


def test_a_second_agent_for_a_job_gives_up(commands: CommandLine, tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    ended = commands.jobs()[-1]
    children = set(psutil.Process().children(recursive=True))
    (tmp_path / "spec.json").write_bytes(ended.spec_file.read_bytes())
    (tmp_path / "state.json").write_bytes(ended.state_file.read_bytes())
    before = job.state_file.read_bytes()
    with job.supervising():
        done = commands("agent", str(tmp_path))
    assert done.returncode == 1
    assert f"job {tmp_path.name} has an agent already" in done.stderr
    assert job.state_file.read_bytes() == before
    assert set(psutil.Process().children(recursive=True)) <= children
