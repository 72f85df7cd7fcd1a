"""A model that lies on one node alone, and data on the laptop alone: tuned by both nodes and asked, as if all lay on both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.laptop import Laptop

pytestmark = pytest.mark.timeout(900)  # three jobs, which take half a minute where nothing else runs

THERE = "/home/spark/models/small"


@pytest.fixture(autouse=True)
def _tidy(laptop: Laptop) -> Iterator[None]:
    yield
    for host in laptop.lab.hosts:
        host.run(["rm", "-rf", ".sparkctl/halves", ".sparkctl/jobs", "models"])


def test_it_is_tuned_with_the_same_losses_asked_and_cleaned_away(laptop: Laptop, tmp_path: Path) -> None:
    for path in (laptop.shared / "model").iterdir():
        laptop.peer.write(f"{THERE}/{path.name}", path.read_bytes())
    shutil.copy(laptop.shared / "rows.jsonl", tmp_path / "rows.jsonl")
    recipe = laptop.recipe(
        "placed",
        max_steps=2,
        base_model=f"{laptop.peer.name}:{THERE}",
        datasets=[{"path": str(tmp_path / "rows.jsonl"), "type": "qa"}],
    )
    done = laptop("run", recipe, "--json", seconds=400)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)["job"]
    losses = laptop.losses(job)
    assert len(losses) == 2
    assert losses == pytest.approx(losses_of_one_process(laptop, tmp_path), abs=1e-6)
    asked = laptop("ask", job, "What is it?", "--max-tokens", "4", "--json", seconds=400)
    assert asked.returncode == 0, asked.stderr
    assert len(json.loads(asked.stdout)) == 1
    head, peer = (host.run(["sh", "-c", "ls .sparkctl/halves"]).stdout for host in laptop.lab.hosts)
    assert "layers-0-1" in head
    assert "layers" not in peer  # its own lies there
    assert "rows.jsonl" in head
    cleaned = laptop("clean", "--yes", "--results")
    assert cleaned.returncode == 0, cleaned.stderr
    for host in laptop.lab.hosts:
        left = host.run(["sh", "-c", "ls -A .sparkctl/halves .sparkctl/jobs | grep -v : || true"]).stdout
        assert left.split() == []


def losses_of_one_process(laptop: Laptop, tmp_path: Path) -> list[float]:
    """Of the same recipe on this machine, whole."""
    recipe = laptop.recipe("whole", max_steps=2, nodes=1)
    here = {"SPARKCTL_HOME": str(tmp_path / "home"), "SPARKCTL_INVENTORY": str(tmp_path / "embedded.yaml")}
    (tmp_path / "embedded.yaml").write_text(
        "nodes: [{name: left, transport: local}, {name: right, transport: local}]\nenv: {OMP_NUM_THREADS: 1}\n"
    )
    done = laptop("run", recipe, "--json", seconds=300, **here)
    assert done.returncode == 0, done.stderr
    metrics = Path(json.loads(done.stdout)["folder"]) / "metrics.jsonl"
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]
