"""Jobs over two hosts: the same losses as on one machine, over the link alone, and everything that a user asks of a job."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.commandline import CommandLine, losses
from tests.lab import Host
from tests.laptop import Laptop

pytestmark = pytest.mark.timeout(600)

SECRET = "for-the-ranks"
# Enough steps that one can come in between; no evaluation, which would only take time.
STEPS = 80
QUICK: dict[str, Any] = {"max_steps": STEPS, "eval_steps": None, "val_set_size": None, "save_steps": 10}


@dataclass
class Watched:
    """A fine-tune that ran over both hosts, and what was seen meanwhile."""

    laptop: Laptop
    job: str
    moved: dict[str, list[int]] = field(default_factory=dict)  # bytes by interface of the head
    environments: dict[str, str] = field(default_factory=dict)  # of a rank, by host
    sockets: set[str] = field(default_factory=set)  # addresses that ranks listen on or talk from
    running: list[str] = field(default_factory=list)
    enabled: str = ""


@pytest.fixture(scope="module")
def watched(laptop: Laptop) -> Iterator[Watched]:
    recipe = laptop.recipe("tiny", **QUICK)
    before = _counters(laptop.head)
    job = laptop.detach(recipe)
    seen = Watched(laptop, job)
    laptop.until(lambda: _has_begun(laptop, job), 240, "the first step")
    at_work = _counters(laptop.head)
    seen.running = laptop.remains()
    seen.enabled = laptop.head.run(["systemctl", "--user", "is-enabled", f"sparkctl-job@{job}"]).stdout.strip()
    for host in laptop.lab.hosts:
        ranks = [process.pid for process in host.processes() if "worker" in process.argv]
        for pid in ranks:
            seen.sockets |= _addresses(pid)
        seen.environments[host.name] = " ".join(Path(f"/proc/{pid}/environ").read_text() for pid in ranks)
    laptop.until(lambda: _has_ended(laptop, job), 240, "the end of the job")
    after = _counters(laptop.head)
    seen.moved = {name: [at_work[name] - before[name], after[name] - at_work[name]] for name in after}
    yield seen


def _addresses(pid: int) -> set[str]:
    """The IPv4 addresses that a process's TCP sockets are bound to, in the network namespace of the process (proc_pid_net(5))."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inodes |= set(re.findall(r"socket:\[(\d+)\]", str(descriptor.readlink())))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    own = [int(row[1].partition(":")[0], 16).to_bytes(4, "little") for row in rows if row[9] in inodes]
    return {str(ipaddress.IPv4Address(address)) for address in own}


def _counters(host: Host) -> dict[str, int]:
    names = [*host.rails, "enP7s7"]
    return {name: sum(vars(host.counters(name)).values()) for name in names}


def _has_begun(laptop: Laptop, job: str) -> bool:
    state = laptop.state(laptop.head, job)
    assert state is not None and not state.ended, (state, laptop.read(laptop.head, job, "rank0.log"))
    return bool(laptop.losses(job))


def _has_ended(laptop: Laptop, job: str) -> bool:
    state = laptop.state(laptop.head, job)
    return state is not None and state.ended and not laptop.remains()


def test_losses_are_those_of_the_embedded_pair(watched: Watched, tmp_path: Path) -> None:
    state = watched.laptop.state(watched.laptop.head, watched.job)
    assert state is not None and (state.state, state.attempt) == ("succeeded", 1), state
    alone = CommandLine(tmp_path)
    done = alone("run", str(watched.laptop.shared / "tiny.yaml"), "--quiet", seconds=500)
    assert done.returncode == 0, done.stderr
    assert watched.laptop.losses(watched.job) == pytest.approx(losses(alone.jobs()[-1]), abs=1e-6)


def test_a_rank_that_is_killed_on_the_way_changes_no_loss(watched: Watched) -> None:
    laptop = watched.laptop
    job = laptop.detach(laptop.recipe("again", **QUICK, restart={"max": 1, "backoff": "1s"}))
    laptop.until(lambda: _has_begun(laptop, job), 240, "the first step")
    (rank,) = [process.pid for process in laptop.peer.processes() if "worker" in process.argv]
    os.kill(rank, signal.SIGKILL)
    laptop.until(lambda: _has_ended(laptop, job), 240, "the end of the job")
    state = laptop.state(laptop.head, job)
    assert state is not None and (state.state, state.attempt) == ("succeeded", 2), state
    assert laptop.losses(job) == pytest.approx(laptop.losses(watched.job), abs=1e-6)


def test_activations_cross_the_link_and_not_the_management_network(watched: Watched) -> None:
    rails = [watched.moved[name][1] for name in watched.laptop.head.rails]
    assert sum(rails) > 2_000_000  # many steps of four micro-batches, forward and back
    assert min(rails) > sum(rails) / 4  # they take turns
    # Whatever the agents say meanwhile on the management network, no rank has a socket there, nor on any wildcard.
    assert {".".join(address.split(".")[:3]) for address in watched.sockets} == {"192.168.100", "192.168.101"}
    environment = watched.environments[watched.laptop.head.name]
    assert "MASTER_ADDR=192.168.100.10" in environment
    assert f"GLOO_SOCKET_IFNAME={','.join(watched.laptop.head.rails)}" in environment


def test_each_node_runs_an_agent_in_its_unit_and_one_rank(watched: Watched) -> None:
    for host in watched.laptop.lab.hosts:
        mine = [text for text in watched.running if text.startswith(f"{host.name}:")]
        assert len([text for text in mine if " agent " in text]) == 1
        assert len([text for text in mine if " worker " in text]) == 1
    assert watched.enabled == "enabled"
    shown = watched.laptop.head.run(
        ["systemctl", "--user", "is-enabled", f"sparkctl-job@{watched.job}"], check=False
    ).stdout
    assert shown.strip() == "disabled"  # its end has seen to it


def test_secrets_reach_the_ranks_and_no_file(watched: Watched) -> None:
    for host in watched.laptop.lab.hosts:
        assert f"PAIR_TOKEN={SECRET}" in watched.environments[host.name]
        assert "PAIR_SAYS=hello" in watched.environments[host.name]
        found = host.run(["grep", "-rl", SECRET, host.home, "/tmp", "/run/user"], "root", check=False).stdout
        assert found == ""
        folder = watched.laptop.folder(host, watched.job)
        modes = host.run(["find", folder, "-perm", "/077"]).stdout
        assert modes == ""


def test_logs_carry_the_rank_of_either_node(watched: Watched) -> None:
    shown = watched.laptop("logs", watched.job[-4:])
    assert shown.returncode == 0, shown.stderr
    assert "rank 0 | node spark-a holds embedding + layers 0-1 on cpu" in shown.stdout.splitlines()
    assert "rank 1 | node spark-b holds layers 2-3 + head on cpu" in shown.stdout.splitlines()


def test_jobs_are_listed_with_their_state_and_a_second_laptop_sees_them_too(watched: Watched, tmp_path: Path) -> None:
    laptop = watched.laptop
    shutil.copytree(laptop.lab.home / ".ssh", tmp_path / ".ssh")
    for home in (str(laptop.lab.home), str(tmp_path)):  # the second has no pair.json: the head tells
        done = laptop("jobs", "--json", HOME=home)
        assert done.returncode == 0, done.stderr
        row = next(row for row in json.loads(done.stdout) if row["id"] == watched.job)
        assert (row["state"], row["step"], row["total_steps"]) == ("succeeded", STEPS, STEPS)
    assert not (tmp_path / ".sparkctl" / "jobs").exists()


def test_a_named_node_runs_a_recipe_whole_and_is_stopped_gently(watched: Watched) -> None:
    laptop = watched.laptop
    job = laptop.detach(laptop.recipe("whole", max_steps=100_000, nodes="spark-b", eval_steps=None))
    laptop.until(lambda: laptop.read(laptop.peer, job, "metrics.jsonl"), 240, "the first step")
    assert laptop.read(laptop.head, job, "spec.json") == b""  # the other node knows nothing of it
    assert {text.partition(":")[0] for text in laptop.remains()} == {"spark-b"}
    stopped = laptop("stop", job)
    assert (stopped.returncode, stopped.stdout) == (0, f"job {job}: stopped\n"), stopped.stderr
    laptop.until(lambda: not laptop.remains(), 20, "the end of the agent")


def test_nodes_with_other_code_are_refused(watched: Watched) -> None:
    laptop = watched.laptop
    found = laptop.lab.home / ".sparkctl" / "pair.json"
    kept = found.read_bytes()
    try:
        record = json.loads(kept)
        found.write_text(json.dumps({**record, "code": "0" * 16}))
        done = laptop("run", laptop.recipe("old"))
    finally:
        found.write_bytes(kept)
    assert done.returncode == 3
    assert "another version of sparkctl" in done.stderr
    assert "old-" not in laptop("jobs", "--all").stdout
