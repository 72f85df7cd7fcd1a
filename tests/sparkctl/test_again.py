"""What was run can be told by its hashes, and repeated exactly."""

from __future__ import annotations

import json

import pytest

from launch.again import fingerprints, model_of
from launch.job import JobFolder
from tests.commandline import finished, losses, wait_for

pytestmark = pytest.mark.timeout(900)


def test_a_job_is_repeated_exactly_and_has_the_same_hashes() -> None:
    seen = finished()
    again = seen.commands("run", "--again", seen.job.id, "--detach")
    assert again.returncode == 0, again.stderr
    job = JobFolder(seen.commands.home / "jobs" / again.stdout.strip())
    wait_for(lambda: job.state().ended, 600)
    assert job.state().state == "succeeded", job.state()
    assert losses(job) == losses(seen.job)
    assert job.spec().recipe == seen.job.spec().recipe
    listed = {row["id"]: row for row in json.loads(seen.commands("jobs", "--all", "--json").stdout)}
    first, second = (listed[one.id]["fingerprints"] for one in (seen.job, job))
    assert first == second
    assert all(first[name] for name in ("recipe", "plan", "code", "model"))
    shown = seen.commands("jobs", "--all", COLUMNS="250").stdout
    assert shown.count(first["recipe"][:8]) >= 2


def test_other_code_is_not_taken_for_the_same() -> None:
    seen = finished()
    path = seen.job.spec_file
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"code": "0123456789abcdef"}))
    try:
        refused = seen.commands("run", "--again", seen.job.id, "--detach")
    finally:
        path.write_text(kept)
    assert refused.returncode == 3
    assert "ran with code 0123456789abcdef" in refused.stderr


@pytest.mark.parametrize("words", [[], ["tiny.yaml", "--again", "x"], ["--again", "x", "--set", "a=1"]])
def test_a_recipe_or_a_job_is_asked_for(words: list[str]) -> None:
    done = finished().commands("run", *words)
    assert done.returncode == 2
    assert "give a RECIPE, or --again JOB" in done.stderr


def test_a_changed_recipe_plan_or_model_shows() -> None:
    seen = finished()
    spec = seen.job.spec()
    other = spec.model_copy(update={"recipe": spec.recipe | {"seed": 7}, "layers": spec.layers + 1})
    before, after = fingerprints(spec), fingerprints(other)
    assert before["recipe"] != after["recipe"]
    assert before["plan"] != after["plan"]
    model = seen.commands.folder / "model"
    assert model_of(str(model)) == before["model"]
    (model / "more.txt").write_text("x")
    try:
        assert model_of(str(model)) != before["model"]
    finally:
        (model / "more.txt").unlink()
    assert model_of("/not/here/half-abc") == "half-abc"
