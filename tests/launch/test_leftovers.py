"""`clean` finds what nothing refers to, keeps what anything does, and removes nothing that its owner has not seen."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.transport.local import LocalTransport
from launch import leftovers, stock
from launch.leftovers import Half, Job, Leftover, Stock

HOME = "/home/spark/.sparkctl"


def job(name: str, *results: str, ended: bool = True, reads: str = "") -> Job:
    return Job(name, 1, ended, "failed" if ended else "running", results, json.dumps({"id": name, "reads": reads}))


def half(name: str, *, unfinished: bool = False, busy: bool = False) -> Half:
    return Half(name, 1, unfinished, busy)


def paths(*stocks: Stock, results: bool = False) -> list[str]:
    return [f"{one.node} {one.path}" for one in leftovers.leftovers(stocks, results=results)]


def node(name: str, *jobs: Job, halves: tuple[Half, ...] = (), codes: tuple[str, ...] = ("now",)) -> Stock:
    return Stock(name, HOME, "now", jobs, halves, dict.fromkeys(codes, 1))


def test_a_job_goes_when_it_has_ended_everywhere_and_left_no_result_anywhere() -> None:
    head = node("a", job("idle"), job("tuned", "adapter"), job("runs", ended=False), job("half-alive"))
    peer = node("b", job("idle"), job("tuned"), job("half-alive", ended=False))
    assert paths(head, peer) == ["a jobs/idle", "b jobs/idle"]
    assert paths(head, peer, results=True) == ["a jobs/idle", "a jobs/tuned", "b jobs/idle", "b jobs/tuned"]


def test_what_a_job_that_stays_reads_stays() -> None:
    halves = (
        half("model-1"),
        half("model-2"),
        half(".model-3.part", unfinished=True),
        half(".model-4.part", unfinished=True, busy=True),
    )
    kept, gone = job("serves", ended=False, reads=f"{HOME}/halves/model-1"), job("idle", reads=f"{HOME}/halves/model-2")
    assert paths(node("a", kept, gone, halves=halves)) == ["a jobs/idle", "a halves/model-2", "a halves/.model-3.part"]


def test_a_job_whose_adapter_is_served_stays() -> None:
    tuned = job("tuned", "adapter")
    for reads in (f"{HOME}/jobs/tuned/adapter", "tuned"):
        assert paths(node("a", tuned, job("serves", ended=False, reads=reads)), results=True) == []
    assert paths(node("a", tuned, job("serves", ended=False, reads="tuned-2")), results=True) == ["a jobs/tuned"]


def test_other_code_goes_unless_a_job_runs_that_may_have_been_started_by_it() -> None:
    assert paths(node("a", codes=("old", "now"))) == ["a code/old"]
    assert paths(node("a", codes=("old", "now")), node("b", job("runs", ended=False))) == []
    assert paths(Stock("a", HOME, "", codes={"old": 1})) == []  # no pair: nobody knows which is its own


# On a real folder.


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a node might keep."""
    home = tmp_path / "home"
    monkeypatch.setenv("SPARKCTL_HOME", str(home))
    for name, state, result in (("idle", "failed", ""), ("tuned", "succeeded", "adapter"), ("runs", "running", "")):
        folder = home / "jobs" / name
        (folder / (result or "tensorboard")).mkdir(parents=True)
        (folder / "spec.json").write_text(json.dumps({"id": name, "model": f"{home}/halves/{name}-model"}))
        (folder / "state.json").write_text(json.dumps({"state": state}))
        (folder / "agent.lock").touch()
        if result:
            (folder / result / "adapter_model.safetensors").write_bytes(b"12345678")
        (home / "halves" / f"{name}-model").mkdir(parents=True)
        (home / "halves" / f"{name}-model" / "model.safetensors").write_bytes(os.urandom(100_000))
    (home / "halves" / ".broken.part").mkdir()
    (home / "code" / "1234").mkdir(parents=True)
    (home / "ssh").mkdir()
    (home / "ssh" / "id_ed25519").write_text("a key")
    return home


def found(home: Path) -> list[str]:
    return [one.path for one in leftovers.leftovers(leftovers.look([LocalTransport("here")]))]


def test_a_folder_is_looked_at_as_it_is(home: Path) -> None:
    assert found(home) == ["jobs/idle", "halves/.broken.part", "halves/idle-model"]
    (seen,) = leftovers.look([LocalTransport("here")])
    assert {half.name: half.size >= 100_000 for half in seen.halves} == {
        ".broken.part": False, "idle-model": True, "runs-model": True, "tuned-model": True,
    }  # fmt: skip
    os.utime(home / "jobs" / "runs", (0, 0))  # long ago, and no agent holds its lock
    assert "jobs/runs" in found(home)
    with (home / "jobs" / "runs" / "agent.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "jobs/runs" not in found(home)


def test_what_is_in_use_by_now_is_left(home: Path) -> None:
    nodes = [LocalTransport("here")]
    seen = leftovers.leftovers(leftovers.look(nodes))
    with (home / "jobs" / "idle" / "agent.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        gone = leftovers.remove(nodes, seen)
    assert [one.path for one in gone] == ["halves/.broken.part", "halves/idle-model"]
    assert (home / "jobs" / "idle").is_dir()


@pytest.mark.parametrize(
    "path", ["ssh/id_ed25519", "jobs/../ssh", "jobs/", "../x", "halves/a/b", "pair.json", "jobs/."]
)
def test_nothing_else_is_ever_removed(path: str, home: Path) -> None:
    before = sorted(home.rglob("*"))
    assert stock.remove(str(home), [path]) == []
    assert leftovers.remove([LocalTransport("here")], [Leftover("here", "job", path, 1, "")]) == ()
    assert sorted(home.rglob("*")) == before


def test_a_link_is_not_followed(home: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (home / "halves" / "link").symlink_to(tmp_path / "precious")
    assert "halves/link" not in found(home)
    assert stock.remove(str(home), ["halves/link"]) == []
    assert (tmp_path / "precious").is_dir()


Clean = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def clean(home: Path) -> Clean:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "sparkctl", "clean", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)

    return run


def test_the_command_shows_and_removes_only_with_yes(home: Path, clean: Clean) -> None:
    shown = clean()
    assert shown.returncode == 0, shown.stderr
    assert "halves/idle-model" in shown.stdout
    assert "no job reads it" in shown.stdout
    assert "nothing was removed: `sparkctl clean --yes` does it" in shown.stderr
    assert (home / "jobs" / "idle").is_dir()
    done = clean("--yes")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (home / "jobs").iterdir()) == ["runs", "tuned"]
    assert sorted(path.name for path in (home / "halves").iterdir()) == ["runs-model", "tuned-model"]
    assert (home / "ssh" / "id_ed25519").read_text() == "a key"
    assert "nothing to clean" in clean().stdout


def test_the_command_answers_programs(home: Path, clean: Clean) -> None:
    told: dict[str, Any] = json.loads(clean("--json").stdout)
    assert [one["path"] for one in told["found"]] == ["jobs/idle", "halves/.broken.part", "halves/idle-model"]
    assert told["removed"] == []
    told = json.loads(clean("--json", "--yes", "--results").stdout)
    assert "jobs/tuned" in told["removed"]
    assert not (home / "halves" / "tuned-model").exists()


def test_tokenised_datasets_go_unless_a_job_runs() -> None:
    idle = Stock("a", HOME, "now", (job("tuned", "adapter"),), tokens={"abc": 5})
    assert leftovers.leftovers([idle]) == (
        Leftover("a", "tokens", "tokens/abc", 5, "a tokenised dataset; made again when needed"),
    )
    assert paths(idle, node("b", job("runs", ended=False))) == []


def test_tokenised_datasets_are_found_and_removed(tmp_path: Path) -> None:
    (tmp_path / "tokens" / "abc").mkdir(parents=True)
    (tmp_path / "tokens" / "abc" / "ids.npy").write_bytes(b"1" * 5000)
    found = stock.look(str(tmp_path))["tokens"]
    assert [one["name"] for one in found] == ["abc"]
    assert found[0]["size"] >= 5000
    assert stock.remove(str(tmp_path), ["tokens/abc"]) == ["tokens/abc"]
    assert not (tmp_path / "tokens" / "abc").exists()
