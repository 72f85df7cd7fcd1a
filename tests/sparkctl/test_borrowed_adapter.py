"""`adapter_from`, served: base and adapter of a fine-tuned job, each under its name."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launch.inference.endpoint import Endpoint
from launch.job import JobFolder
from tests.commandline import Watched, finished, wait_for

pytestmark = pytest.mark.timeout(600)

QUESTION = "What is 3?"


@pytest.fixture(scope="module")
def tuned() -> Watched:
    """The finished fine-tune."""
    return finished()


@pytest.fixture(scope="module")
def answer(tuned: Watched) -> str:
    """What `ask` has it say, as the terminal shows it."""
    done = tuned.commands("ask", tuned.job.id, QUESTION, "--max-tokens", "12")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def borrowed(tuned: Watched) -> Iterator[JobFolder]:
    """A job that serves the model of the fine-tune with its adapter."""
    write(tuned.commands.folder / "borrowed.yaml", tuned.job.id)
    job = tuned.commands.detach("borrowed.yaml")
    try:
        wait_for(lambda: job.state().state == "ready" or job.state().ended, seconds=400)
        assert job.state().state == "ready", job.state()
        yield job
    finally:
        with suppress(subprocess.TimeoutExpired):  # the home is shared: nothing of it stays
            tuned.commands("stop", job.id, "--now")
            shutil.rmtree(job.path)


def write(path: Path, job: str, **changes: Any) -> None:
    """A recipe that takes its adapter from `job`."""
    recipe = {"kind": "inference", "name": "base", "base_model": "./model", "adapter_from": job}
    path.write_text(json.dumps(recipe | {"max_model_len": 64, "max_num_seqs": 2, "port": 0} | changes))


def test_a_recipe_serves_the_adapter_of_a_job_under_its_name(tuned: Watched, borrowed: JobFolder, answer: str) -> None:
    endpoint = Endpoint.read(borrowed.path)
    assert endpoint is not None
    assert list(endpoint.models) == [tuned.job.id, "base"]
    asked = tuned.commands("ask", borrowed.id, QUESTION, "--max-tokens", "12", "--model", tuned.job.id)
    assert (asked.returncode, asked.stdout) == (0, answer), asked.stderr
    of_base = tuned.commands("ask", borrowed.id, QUESTION, "--max-tokens", "12", "--model", "base")
    assert of_base.returncode == 0, of_base.stderr
    assert of_base.stdout != answer
