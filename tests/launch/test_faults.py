"""What happens to a fine-tune over two hosts when things go wrong: nothing hangs, nothing is left, and it goes on when it can.

One job runs through most of the faults: after each it must be at work again, in a new attempt or, where the fault is one that a job
outlives, in the same.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from launch.agent.watch import HALTED, SILENT
from tests.lab import Host
from tests.laptop import Laptop

pytestmark = pytest.mark.timeout(600)

# Seconds until a job is at work again: the fault is found, both sides end, torch loads anew. A loaded machine takes its time.
BACK_WITHIN = 240.0
# Both sides are down so long after a fault was found, at the latest.
DOWN_WITHIN = 10.0


@dataclass
class Running:
    """A job that goes on for ever, and its head's events."""

    laptop: Laptop
    job: str

    def events(self, host: Host | None = None) -> list[dict[str, Any]]:
        text = self.laptop.read(host or self.laptop.head, self.job, "events.jsonl").decode()
        return [json.loads(line) for line in text.splitlines()]

    @property
    def attempt(self) -> int:
        state = self.laptop.state(self.laptop.head, self.job)
        return 0 if state is None else state.attempt

    def steps(self) -> int:
        return len(self.laptop.read(self.laptop.head, self.job, "metrics.jsonl").splitlines())

    def at_work(self, attempt: int) -> None:
        """Wait until this attempt takes steps."""

        def running() -> bool:
            state = self.laptop.state(self.laptop.head, self.job)
            assert state is not None and not state.ended, (state, self.events()[-6:])
            return state.state == "running" and state.attempt == attempt

        self.laptop.until(running, BACK_WITHIN, f"attempt {attempt}")
        self.goes_on()

    def goes_on(self) -> None:
        """Wait for more steps than there are now."""
        before = self.steps()
        self.laptop.until(lambda: self.steps() > before + 1, 60, "another step")

    def rank_of(self, host: Host) -> int:
        """The process of a host's rank, as this machine counts."""
        (pid,) = [process.pid for process in host.processes() if "worker" in process.argv]
        return pid

    def agent_of(self, host: Host) -> int:
        (pid,) = [
            process.pid for process in host.processes() if "agent" in process.argv and self.job in process.argv[-1]
        ]
        return pid

    def survives(self, fault: Callable[[], object], mend: Callable[[], object], says: str) -> dict[str, Any]:
        """Do it, see it found, mend it, and see the next attempt at work; the verdict, as the head noted it.

        In between nothing of the attempt may run: the old ranks are gone before new ones come.
        """
        attempt, seen = self.attempt, len(self.events())
        old = {
            process.pid for host in self.laptop.lab.hosts for process in host.processes() if "worker" in process.argv
        }
        fault()

        def found() -> bool:
            return any(event["event"] == "verdict" for event in self.events()[seen:])

        self.laptop.until(found, 90, f"the verdict: {says}")
        mend()
        self.at_work(attempt + 1)
        new = {
            process.pid for host in self.laptop.lab.hosts for process in host.processes() if "worker" in process.argv
        }
        assert not old & new
        assert len(new) == 2
        verdict, *after = [event for event in self.events()[seen:] if event["event"] in ("verdict", "ranks ended")]
        assert says in verdict["reason"], verdict
        assert verdict["again"]
        ended = next(event for event in after if event["event"] == "ranks ended")
        assert ended["clock"] - verdict["clock"] < DOWN_WITHIN + SILENT  # a dead peer is given up after its silence
        return verdict


@pytest.fixture(scope="module")
def running(laptop: Laptop) -> Iterator[Running]:
    recipe = laptop.recipe(
        "faults", max_steps=100_000, eval_steps=None, val_set_size=None, restart={"max": 50, "backoff": "1s"}
    )
    # Without secrets, which are kept in memory alone: a node that lost power could not bring a job back that has some.
    plain = laptop.lab.home / "plain.yaml"
    plain.write_text(laptop.inventory.read_text().replace(", PAIR_TOKEN: for-the-ranks", ""))
    made = Running(laptop, laptop.detach(recipe, "-i", str(plain)))
    made.at_work(1)
    yield made
    stopped = laptop("stop", "--now", made.job)
    assert stopped.returncode == 0, stopped.stderr
    laptop.until(lambda: not laptop.remains(), 30, "the end of both agents")


def test_a_killed_rank_is_named_and_the_job_goes_on(running: Running) -> None:
    peer = running.laptop.peer
    running.survives(
        lambda: os.kill(running.rank_of(peer), signal.SIGKILL),
        lambda: None,
        "rank 1 (node spark-b) was ended by SIGKILL",
    )


def test_a_stopped_rank_is_found_by_its_standing_still(running: Running) -> None:
    head = running.laptop.head
    began = running.events()[-1]["clock"]
    verdict = running.survives(
        lambda: os.kill(running.rank_of(head), signal.SIGSTOP),
        lambda: None,
        "rank 0 (node spark-a) is stopped, as by SIGSTOP",
    )
    assert verdict["clock"] - began > HALTED


def test_a_cable_that_comes_back_soon_is_outlived(running: Running) -> None:
    attempt = running.attempt
    running.laptop.lab.cut()
    try:
        running.laptop.until(lambda: not running.laptop.head.carrier(running.laptop.head.rails[0]), 5, "darkness")
    finally:
        running.laptop.lab.heal()
    running.goes_on()
    assert running.attempt == attempt


def test_a_link_that_stays_dark_is_told_from_a_dead_node(running: Running) -> None:
    lab = running.laptop.lab
    running.survives(lab.cut, lab.heal, "nothing came over the link from spark-b to spark-a for 10 s")


def test_with_one_rail_the_job_goes_on_over_the_other(running: Running) -> None:
    lab = running.laptop.lab
    try:
        running.survives(lambda: lab.cut(1), lambda: None, "nothing came over rail 1 of the link")
        assert [event["rails"] for event in running.events() if event["event"] == "attempt"][-1] == [0]
    finally:
        lab.heal()


def test_a_killed_agent_takes_its_rank_with_it_and_comes_back(running: Running) -> None:
    peer = running.laptop.peer
    running.survives(
        lambda: os.kill(running.agent_of(peer), signal.SIGKILL),
        lambda: None,
        "agent",  # which came back, or fell silent: whichever of it and its rank's end is noticed first
    )


def test_a_killed_agent_of_the_head_comes_back_and_starts_anew(running: Running) -> None:
    attempt = running.attempt
    os.kill(running.agent_of(running.laptop.head), signal.SIGKILL)
    running.at_work(attempt + 1)


def test_management_network_and_sshd_are_not_needed_and_logs_go_on(running: Running) -> None:
    head, attempt = running.laptop.head, running.attempt
    with running.laptop.started("logs", "-f", running.job) as follower:
        head.management(False)
        try:
            running.goes_on()
        finally:
            head.management(True)
        head.sshd(False)
        running.goes_on()
        head.sshd(True)
        assert follower.poll() is None  # it looks again and again
    assert running.attempt == attempt


def test_power_lost_on_the_peer_is_found_and_the_job_returns_with_it(running: Running) -> None:
    peer = running.laptop.peer
    running.survives(peer.power_off, peer.power_on, "no word from node spark-b for 10 s")
