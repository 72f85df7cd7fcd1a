"""A job that its owner starts on the head itself (`transport: local`): the same losses, and what the laptop sees of it too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

from cluster.record import PairRecord
from tests.commandline import finished, losses
from tests.laptop import Laptop

pytestmark = pytest.mark.timeout(500)


@pytest.fixture
def on_head(laptop: Laptop) -> Iterator[list[str]]:
    """`sparkctl` on the head, with an inventory that has it as this machine, and the record that `up` would have left there."""
    head, peer = laptop.head, laptop.peer
    place, trusted = f"{head.home}/.sparkctl/pair.json", f"{head.home}/.ssh/known_hosts"
    kept = {path: head.run(["cat", path], check=False, text=False).stdout for path in (place, trusted)}
    record = PairRecord.model_validate_json(kept[place])
    here, there = record.nodes
    ours = record.model_copy(update={"nodes": (here.model_copy(update={"address": None}), there)})
    head.write(f"{head.home}/visitor", laptop.lab.identity_file.read_bytes(), mode=0o600)
    head.write(
        f"{head.home}/pair.yaml",
        "nodes:\n  - {name: spark-a, transport: local}\n"
        f"  - {{name: spark-b, host: {peer.address}, user: spark, identity_file: {head.home}/visitor}}\n"
        "env: {OMP_NUM_THREADS: 1, PAIR_TOKEN: for-the-ranks}\n",
    )
    head.write(trusted, kept[trusted] + f"{peer.address} {peer.host_key()}\n".encode(), mode=0o600)
    head.write(place, ours.as_json(), mode=0o600)
    try:
        yield [
            *("env", f"PYTHONPATH={PurePosixPath(here.code)}", f"SPARKCTL_INVENTORY={head.home}/pair.yaml"),
            *(here.python, "-P", "-m", "sparkctl"),
        ]
    finally:
        head.write(place, kept[place], mode=0o600)
        head.write(trusted, kept[trusted], mode=0o600)
        head.run(["rm", f"{head.home}/visitor", f"{head.home}/pair.yaml"])


def test_a_job_started_on_the_head_trains_over_both_and_the_laptop_sees_it(laptop: Laptop, on_head: list[str]) -> None:
    recipe = laptop.shared / laptop.recipe("beside")
    done = laptop.head.run([*on_head, "run", recipe, "--json"], check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert (ended["state"], ended["last"]["step"]) == ("succeeded", 12)
    assert laptop.losses(ended["job"]) == pytest.approx(losses(finished().job), abs=1e-6)
    spoken = laptop.head.run([*on_head, "logs", ended["job"]], check=False).stdout
    assert "rank 1 | node spark-b holds layers 2-3 + head on cpu" in spoken.splitlines()
    seen = laptop("logs", ended["job"])
    assert seen.stdout == spoken
    laptop.until(lambda: not laptop.remains(), 30, "the end of both agents")
