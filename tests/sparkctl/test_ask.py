"""`ask`: a fine-tuned job, or an inference recipe, answers; and who cannot be asked says so."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from launch.job import JobState
from sparkctl.cli import main
from tests.commandline import Watched, finished, gone, pids, wait_for

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """The finished fine-tune; commands of this process go to its home."""
    watched = finished()
    monkeypatch.chdir(watched.commands.folder)
    for name in ("SPARKCTL_HOME", "SPARKCTL_INVENTORY"):
        monkeypatch.setenv(name, watched.commands.environment[name])
    return watched


def test_a_job_answers_over_two_ranks_as_its_adapter_does_on_one(seen: Watched) -> None:
    jobs = [job.id for job in seen.commands.jobs()]
    done = seen.commands("ask", seen.job.id[-4:], "What is 3?", "--max-tokens", "12")
    assert done.returncode == 0, done.stderr
    banner, held = done.stderr.splitlines()
    assert banner == "embedded pair: two ranks on this machine over loopback (gloo), no Spark involved"
    assert held == "model, rank 0: embedding + layers 0-1; rank 1: layers 2-3 + head"
    assert [job.id for job in seen.commands.jobs()] == jobs  # questions are their owner's: nothing of them stays

    recipe = {"kind": "inference", "base_model": "./model", "adapter_path": str(seen.job.adapter), "max_model_len": 64}
    (seen.commands.folder / "serve.yaml").write_text("".join(f"{key}: {value}\n" for key, value in recipe.items()))
    questions = ("What is 3?", "What is 4?")
    both = seen.commands("ask", "serve.yaml", *questions, "--set", "nodes=1", "--max-tokens", "12", "--json")
    assert (both.returncode, both.stderr) == (0, "")
    answers = json.loads(both.stdout)
    assert [answer["question"] for answer in answers] == list(questions)
    assert all(1 <= answer["tokens"] <= 12 and answer["finish_reason"] in ("stop", "length") for answer in answers)
    assert answers[0]["answer"]
    # The terminal is spared control characters, which so small a model does utter.
    assert done.stdout == re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", answers[0]["answer"]) + "\n"


def test_ctrl_c_ends_the_asking_and_leaves_nothing(seen: Watched) -> None:
    before = {job.id for job in seen.commands.jobs()}
    with seen.commands.started("ask", seen.job.id, "What is 3?") as process:
        job = wait_for(lambda: [job for job in seen.commands.jobs() if job.id not in before])[0]
        running = wait_for(lambda: pids(job) if job.state().rank_pids else None)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "error: interrupted"
    wait_for(lambda: all(gone(pid) for pid in running))
    assert not job.path.exists()


def test_who_cannot_be_asked_says_so(seen: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    known = seen.job.id
    for arguments, status, told in (
        (["no-such-job", "why?"], 2, "no-such-job: no such job"),
        ([known, " "], 2, "the question is empty"),
        ([known, "why?", "--set", "nodes=1"], 2, "--set goes with a recipe file"),
        (["tiny.yaml", "why?"], 2, "tiny.yaml: kind: finetune cannot be asked"),
        ([known], 2, "Missing argument 'TEXT...'"),
    ):
        assert _status("ask", *arguments) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"error: {told}")
        assert len(err.splitlines()) <= 2


def _status(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


def test_a_job_without_a_result_is_refused(
    seen: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "home" / "jobs" / seen.job.id
    job.mkdir(parents=True)
    (job / "spec.json").write_bytes(seen.job.spec_file.read_bytes())
    (job / "state.json").write_text(JobState(state="failed", reason="it broke").model_dump_json())
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))
    assert _status("ask", seen.job.id, "why?") == 3
    assert capsys.readouterr() == (
        "",
        f"error: job {seen.job.id} is failed: it has no result to ask\n  try: sparkctl logs {seen.job.id}\n",
    )


def test_a_fine_tune_can_be_talked_to_and_is_served_no_longer_than_that(seen: Watched) -> None:
    before = [job.id for job in seen.commands.jobs()]
    asked = seen.commands("ask", seen.job.id, "What is 3?", "--max-tokens", "12", "--json")
    argv = seen.commands.argv("chat", seen.job.id, "--temperature", "0", "--max-tokens", "12", "--json")
    done = subprocess.run(
        argv,
        input="What is 3?\n/new\nWhat is 3?\n",
        cwd=seen.commands.folder,
        env=seen.commands.environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(asked.stdout)[0]["answer"]
    assert json.loads(done.stdout) == [
        {"role": "user", "content": "What is 3?"},
        {"role": "assistant", "content": answer},
    ]
    assert [job.id for job in seen.commands.jobs()] == before


def test_who_has_no_result_cannot_be_talked_to(seen: Watched) -> None:
    job = seen.commands.detach("tiny.yaml", "--set", "max_steps=1000", "--set", "name=endless")
    done = seen.commands("chat", job.id)
    assert done.returncode == 3
    assert re.match(rf"error: job {job.id} is (staging|starting|running): it has no result to ask\n", done.stderr)
    assert seen.commands("stop", "--now", job.id).returncode == 0
    shutil.rmtree(job.path)  # not `clean`: others count on what this home keeps
