"""Faults that reach further than one rank or one cable: the laptop, the clock, the disk, the head, both nodes, the memory.

One job runs through all of them, in this order, as in test_faults.py. It writes a checkpoint every few steps; a step that was taken
twice, before a fault and again after it, must have had the same loss both times.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from launch.agent.watch import SILENT
from tests.laptop import Laptop
from tests.launch.test_faults import BACK_WITHIN, Running

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def running(laptop: Laptop) -> Iterator[Running]:
    """A job that `run` has started; the laptop's process, which follows it, was killed meanwhile."""
    recipe = laptop.recipe(
        "further",
        max_steps=100_000,
        eval_steps=None,
        val_set_size=None,
        save_steps=20,
        restart={"max": 50, "backoff": "1s"},
    )
    plain = laptop.lab.home / "plain.yaml"
    plain.write_text(laptop.inventory.read_text().replace(", PAIR_TOKEN: for-the-ranks", ""))
    laptop.peer.skew_clock(0)  # what starts from here on sees each skew that comes
    with laptop.started("run", recipe, "-i", str(plain)) as process:
        assert process.stdout is not None
        told = ""
        while not (found := re.search(r"^job (further-\w+):", told, re.MULTILINE)):
            line = process.stdout.readline()
            assert line, (told, process.stderr.read() if process.stderr else "")
            told += line
        made = Running(laptop, found[1])
        made.at_work(1)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    yield made
    laptop.peer.skew_clock(0)
    laptop("stop", "--now", made.job)
    laptop.until(lambda: not laptop.remains(), 60, "the end of both agents")


def _back(running: Running, after: int) -> None:
    """Wait until an attempt later than `after` takes steps."""

    def at_work() -> bool:
        state = running.laptop.state(running.laptop.head, running.job)
        assert state is not None and not state.ended, (state, running.events()[-6:])
        return state.attempt > after and state.state == "running"

    running.laptop.until(at_work, BACK_WITHIN, f"an attempt after {after}")
    running.goes_on()


def _no_step_has_two_losses(running: Running) -> None:
    """What was lost and taken again came out as it had before: as in a run without any fault."""
    losses: dict[int, list[float]] = {}
    for entry in running.laptop.metrics(running.job):
        if "loss" in entry:
            losses.setdefault(entry["step"], []).append(entry["loss"])
    twice = [found for found in losses.values() if len(found) > 1]
    assert all(found == pytest.approx([found[0]] * len(found), abs=1e-6) for found in twice)
    assert sorted(losses) == list(range(1, max(losses) + 1))  # and none is missing


def _workers(running: Running) -> dict[str, int]:
    return {
        host.name: sum("worker" in process.argv for process in host.processes())
        for host in running.laptop.lab.hosts
        if host.on
    }


def test_the_laptops_process_is_not_needed(running: Running) -> None:
    running.goes_on()
    assert running.attempt == 1
    listed = json.loads(running.laptop("jobs", "--json").stdout)
    row = next(row for row in listed if row["id"] == running.job)
    assert row["state"] == "running"
    assert set(row["memory"]) == {"spark-a", "spark-b"}
    assert min(row["memory"].values()) > 50 << 20


def test_a_clock_ten_minutes_off_disturbs_neither_the_job_nor_its_restart(running: Running) -> None:
    running.laptop.peer.skew_clock(600)
    running.goes_on()
    assert running.attempt == 1
    running.survives(
        lambda: os.kill(running.rank_of(running.laptop.peer), signal.SIGKILL),
        lambda: None,
        "rank 1 (node spark-b) was ended by SIGKILL",
    )
    running.laptop.peer.skew_clock(0)
    running.goes_on()
    _no_step_has_two_losses(running)


def test_a_disk_that_is_full_at_a_checkpoint_is_named_and_waited_for(running: Running) -> None:
    peer = running.laptop.peer

    def mend() -> None:
        def waits() -> bool:
            noted = [event.get("reason", "") for event in running.events() if event["event"] == "waits"]
            return any(re.fullmatch(r"node spark-b has \d+ MiB of disk free", reason) for reason in noted)

        running.laptop.until(waits, 60, "the agent to wait for room")
        peer.free_disk()

    try:
        running.survives(peer.fill_disk, mend, "No space left on device")
    finally:
        peer.free_disk()
    _no_step_has_two_losses(running)


def test_without_the_heads_power_the_peer_ends_its_rank_and_both_come_back(running: Running) -> None:
    laptop, attempt = running.laptop, running.attempt
    laptop.head.power_off()
    try:
        began = time.monotonic()
        laptop.until(lambda: _workers(running) == {"spark-b": 0}, 60, "the end of the peer's rank")
        noted = [event for event in running.events(laptop.peer) if event["event"] in ("head silent", "ranks ended")]
        silent, ended = noted[-2:]
        assert (silent["event"], ended["event"]) == ("head silent", "ranks ended")
        assert SILENT <= silent["seconds"] < SILENT + 5
        assert silent["clock"] - began < SILENT + 10
    finally:
        laptop.head.power_on()
    _back(running, attempt)
    _no_step_has_two_losses(running)


def test_both_nodes_are_restarted_and_the_job_comes_back_with_them(running: Running) -> None:
    attempt = running.attempt
    before = {process.pid for host in running.laptop.lab.hosts for process in host.processes()}
    going = [threading.Thread(target=host.reboot) for host in running.laptop.lab.hosts]
    for thread in going:
        thread.start()
    for thread in going:
        thread.join()
    assert before.isdisjoint(process.pid for host in running.laptop.lab.hosts for process in host.processes())
    _back(running, attempt)
    assert _workers(running) == {"spark-a": 1, "spark-b": 1}
    _no_step_has_two_losses(running)


def test_a_job_that_takes_all_memory_is_stopped_before_the_box_freezes_and_can_be_resumed(running: Running) -> None:
    laptop = running.laptop
    laptop.peer.facts(meminfo={"MemTotal": 128 << 20, "MemAvailable": 5 << 20})  # of 128 GiB, 5
    try:
        laptop.until(lambda: not laptop.remains(), 60, "the end of the job")
    finally:
        laptop.peer.facts(meminfo={})
    state = laptop.state(laptop.head, running.job)
    assert state is not None and state.state == "failed"
    assert state.reason == (
        "node spark-b: only 5.0 GiB of memory were available; below 6.0 GiB a box freezes, so the job was stopped"
    )
    told = laptop("jobs").stdout
    assert "only 5.0 GiB of memory were available" in next(line for line in told.splitlines() if running.job in line)
    resumed = laptop("resume", running.job, "--detach", "-i", str(laptop.lab.home / "plain.yaml"))
    assert (resumed.returncode, resumed.stdout) == (0, f"{running.job}\n"), resumed.stderr
    _back(running, state.attempt)
    _no_step_has_two_losses(running)
    assert laptop("stop", running.job).returncode == 0
    laptop.until(lambda: not laptop.remains(), 60, "the end of both agents")


@pytest.mark.parametrize("side", [0, 1])
def test_secrets_that_an_agent_lost_end_the_job_on_both_nodes_and_are_handed_over_by_resume(
    laptop: Laptop, side: int
) -> None:
    recipe = laptop.recipe("secret", max_steps=100_000, eval_steps=None, val_set_size=None, save_steps=20)
    made, host = Running(laptop, laptop.detach(recipe)), laptop.lab.hosts[side]
    made.at_work(1)
    os.kill(made.agent_of(host), signal.SIGKILL)
    laptop.until(lambda: not laptop.remains(), 90, "the end of both agents")
    for one in laptop.lab.hosts:
        state = laptop.state(one, made.job)
        assert state is not None and state.state == "failed"
        assert state.reason == (
            f"node {host.name}: the inventory's PAIR_TOKEN was only in the memory of the agent, which had to start anew"
        )
        assert state.fix.startswith(f"`sparkctl resume {made.job}` hands over")
    if side:
        resumed = laptop("resume", made.job, "--detach")
        assert resumed.returncode == 0, resumed.stderr
        _back(made, 1)
        assert laptop("stop", "--now", made.job).returncode == 0
        laptop.until(lambda: not laptop.remains(), 60, "the end of both agents")
