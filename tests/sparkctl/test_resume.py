"""`resume`: a job that failed, and one that was stopped, go on as the same job, and end with the losses of an undisturbed one."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from launch.job import JobFolder
from tests.commandline import CommandLine, finished, gone, losses, metrics, pids, wait_for

pytestmark = pytest.mark.timeout(900)

STEPS = 100


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    made = CommandLine(tmp_path_factory.mktemp("resume"))
    yield made.equip(max_steps=STEPS, eval_steps=None, val_set_size=0, save_steps=10, restart={"max": 0})
    made.end_all()


def _at_work(job: JobFolder, beyond: int) -> None:
    wait_for(lambda: job.state().ended or _newest(job) > beyond)
    assert job.state().state == "running", job.state()


def _newest(job: JobFolder) -> int:
    return max((entry["step"] for entry in metrics(job)), default=0)


def _by_step(job: JobFolder) -> dict[int, float]:
    """Of a step that was taken again, the later loss."""
    return {entry["step"]: entry["loss"] for entry in metrics(job) if "loss" in entry}


def test_a_job_goes_on_after_a_failure_and_after_a_stop_as_if_nothing_had_been(commands: CommandLine) -> None:
    job = commands.detach("tiny.yaml")
    _at_work(job, 12)
    os.kill(job.state().rank_pids[1], signal.SIGKILL)
    wait_for(lambda: job.state().ended)
    assert job.state().state == "failed"

    detached = commands("resume", job.id[-4:], "--detach")
    assert (detached.returncode, detached.stdout) == (0, f"{job.id}\n"), detached.stderr
    refused = commands("resume", job.id)  # it is being loaded
    assert (refused.returncode, refused.stdout) == (3, "")
    assert re.match(f"error: job {job.id} is (staging|starting|running)\n", refused.stderr), refused.stderr
    before = _newest(job)
    _at_work(job, before + 5)
    assert (job.state().attempt, job.state().first) == (2, 2)
    assert commands("stop", job.id).returncode == 0
    assert job.state().state == "stopped"
    at = _newest(job)
    assert at < STEPS

    since = datetime.now(UTC).isoformat()
    followed = commands("resume", job.id)
    assert followed.returncode == 0, followed.stderr
    assert (job.state().state, job.state().attempt) == ("succeeded", 3)
    assert "after step" in job.log(0).read_text()
    taken = [entry["step"] for entry in metrics(job) if "loss" in entry]
    assert taken.count(1) == 1  # it went on: no attempt began from the beginning
    shown = {
        words: commands("logs", job.id, "--rank", "0", *words).stdout.count("holds embedding")
        for words in ((), ("--since", since), ("--since", "1h"))
    }
    assert shown == {(): 3, ("--since", since): 1, ("--since", "1h"): 3}
    undisturbed = commands("run", "--again", job.id, "--quiet")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert list(_by_step(job).values()) == pytest.approx(losses(commands.jobs()[-1]), abs=1e-6)
    wait_for(lambda: all(gone(pid) for pid in pids(job)), 30)


def test_one_that_has_succeeded_has_nothing_left_to_do() -> None:
    seen = finished()
    done = seen.commands("resume", seen.job.id)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"error: job {seen.job.id} has succeeded: it has nothing left to do\n  try: sparkctl run --again {seen.job.id}\n"
    )


def test_no_such_job_is_wrong_usage(commands: CommandLine) -> None:
    done = commands("resume", "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing: no such job\n")
