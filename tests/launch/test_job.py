"""A job's folder: made whole or not at all, found by short ids, and honest about a vanished agent."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cluster.errors import FailedError, WrongInputError
from launch import job
from launch.job import JobFolder, JobSpec, JobState, RankSpec


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _spec(id_: str) -> JobSpec:
    return JobSpec(
        id=id_,
        created=datetime.now(UTC).isoformat(),
        version="0",
        recipe={"kind": "finetune"},
        layers=4,
        ranks=(RankSpec(rank=0, node="left", start=0, end=2), RankSpec(rank=1, node="right", start=2, end=4)),
        master_addr="127.0.0.1",
        embedded=True,
    )


def test_a_new_job_is_whole_and_for_its_owner_alone(home: Path) -> None:
    made = job.create(_spec("tiny-00aa"))
    assert made.path == home / "jobs" / "tiny-00aa"
    assert made.spec() == _spec("tiny-00aa").model_copy(update={"created": made.spec().created})
    assert made.spec().cut(1).last
    assert made.state().state == "staging"
    for path in (home, *home.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_a_job_that_cannot_be_made_leaves_nothing(home: Path) -> None:
    job.create(_spec("tiny-00aa"))
    with pytest.raises(OSError, match="not empty"):
        job.create(_spec("tiny-00aa"))
    assert [path.name for path in (home / "jobs").iterdir()] == ["tiny-00aa"]


def test_what_a_killed_program_left_half_made_is_no_job_and_is_swept(home: Path) -> None:
    abandoned, being_made = (home / "jobs" / f".tiny-000{digit}.new" for digit in (1, 2))
    for path in (abandoned, being_made):
        path.mkdir(parents=True)
        (path / "spec.json").write_text("{")
    an_hour_ago = time.time() - 3600
    os.utime(abandoned, (an_hour_ago, an_hour_ago))
    assert job.folders() == []
    job.create(_spec("tiny-00aa"))
    assert sorted(path.name for path in (home / "jobs").iterdir()) == [".tiny-0002.new", "tiny-00aa"]


def test_ids_are_the_name_and_four_hex_digits() -> None:
    assert len({job.new_id("tiny", ()) for _ in range(20)}) > 15
    name, _, digits = job.new_id("my-recipe", {"my-recipe-0000"}).rpartition("-")
    assert name == "my-recipe"
    assert len(digits) == 4
    int(digits, 16)


def test_jobs_are_found_by_a_whole_id_a_beginning_or_the_digits() -> None:
    ids = ("tiny-00aa", "tiny-00ab", "tiny", "other-0bad")
    assert job.pick(ids, "tiny-00aa") == "tiny-00aa"
    assert job.pick(ids, "tiny") == "tiny"  # a whole id, though others begin so
    assert job.pick(ids, "00ab") == "tiny-00ab"
    assert job.pick(ids, "oth") == "other-0bad"
    with pytest.raises(WrongInputError, match=r"^tiny-00: fits 2 jobs: tiny-00aa, tiny-00ab$"):
        job.pick(ids, "tiny-00")
    for unknown in ("bad", "nothing", ""):
        with pytest.raises(WrongInputError):
            job.pick(ids, unknown)


def test_jobs_are_listed_oldest_first_and_what_is_no_job_is_not() -> None:
    ids = ["z-0001", "a-0002", "m-0003"]
    for order, id_ in enumerate(ids):
        os.utime(job.create(_spec(id_)).spec_file, ns=(order, order))
    (job.home() / "jobs" / "notes").mkdir()
    (job.home() / "jobs" / "file.txt").touch()
    assert [folder.id for folder in job.folders()] == ids


def _running(folder: JobFolder) -> JobFolder:
    folder.write_state(JobState(state="running", agent_pid=os.getpid()))
    return folder


def test_a_job_runs_as_long_as_its_agent_holds_the_lock() -> None:
    folder = _running(job.create(_spec("tiny-00aa")))
    with folder.supervising():
        assert folder.supervised()
        assert folder.state().state == "running"
    assert not folder.supervised()
    state = folder.state()
    assert (state.state, state.reason) == ("failed", "its agent is gone without having said why")
    assert str(folder.agent_log) in state.fix


def test_an_agent_that_never_came_is_not_waited_for_for_ever() -> None:
    folder = job.create(_spec("tiny-00aa"))
    assert folder.state().state == "staging"
    long_ago = (datetime.now(UTC) - timedelta(seconds=job.AGENT_WITHIN + 1)).isoformat()
    folder.state_file.write_text(JobState(state="staging", updated=long_ago).model_dump_json())
    assert (folder.state().state, folder.state().reason) == ("failed", "its agent never started")


def test_the_end_that_an_agent_wrote_stands_when_it_is_gone() -> None:
    folder = job.create(_spec("tiny-00aa"))
    for name in ("succeeded", "failed", "stopped"):
        folder.write_state(JobState(state=name, reason="because"))
        assert (folder.state().state, folder.state().reason) == (name, "because")


def test_a_job_has_one_agent() -> None:
    folder = job.create(_spec("tiny-00aa"))
    with folder.supervising(), pytest.raises(FailedError, match="has an agent already"), folder.supervising():
        pass


def test_whoever_looks_does_not_keep_an_agent_out() -> None:
    folder = job.create(_spec("tiny-00aa"))
    (folder.path / "agent.lock").touch()
    with (folder.path / "agent.lock").open("rb") as onlooker:
        fcntl.flock(onlooker, fcntl.LOCK_SH)
        leaves = threading.Timer(0.2, fcntl.flock, (onlooker, fcntl.LOCK_UN))
        leaves.start()
        with folder.supervising():
            assert folder.supervised()
        leaves.join()


def test_a_damaged_file_is_named() -> None:
    folder = job.create(_spec("tiny-00aa"))
    for damage in (b"", b"{", b'{"state": "dancing"}'):
        folder.state_file.write_bytes(damage)
        with pytest.raises(FailedError, match=r"state\.json: cannot be read"):
            folder.state()


def test_the_last_metrics_are_those_of_the_last_whole_training_step() -> None:
    folder = job.create(_spec("tiny-00aa"))
    assert job.last_metrics(folder) == {}
    folder.metrics.write_text("")
    assert job.last_metrics(folder) == {}
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.7}]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert job.last_metrics(folder) == {"step": 2, "loss": 1.5}
