"""What each fault costs a fine-tune over two hosts: `python -m tests.benchmarks.faults [FAULT...]`, as root. One table.

detected  seconds from the fault to the head's verdict
down      seconds from the verdict until no rank of the attempt ran on either node
back      seconds from the fault until the next attempt took steps
lost      steps that had been taken and were taken again

The hosts are simulated on this machine: what it takes to load torch there is most of `back`.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.laptop import Laptop, laptop_with_pair
from tests.launch.test_faults import Running


def main() -> None:
    """Run all faults, one after the other, on one job."""
    with tempfile.TemporaryDirectory() as folder, laptop_with_pair(Path(folder)) as laptop:
        recipe = laptop.recipe(
            "faults",
            max_steps=100_000,
            eval_steps=None,
            val_set_size=None,
            save_steps=20,
            restart={"max": 50, "backoff": "1s"},
        )
        plain = laptop.lab.home / "plain.yaml"
        plain.write_text(laptop.inventory.read_text().replace(", PAIR_TOKEN: for-the-ranks", ""))
        running = Running(laptop, laptop.detach(recipe, "-i", str(plain)))
        running.at_work(1)
        print(f"{'fault':28} {'detected':>9} {'down':>7} {'back':>7} {'lost':>6}")
        for name, fault, mend in _faults(laptop, running):
            if sys.argv[1:] and name not in sys.argv[1:]:
                continue
            print(f"{name:28} {_row(running, fault, mend)}", flush=True)
        laptop("stop", "--now", running.job)


def _faults(laptop: Laptop, running: Running) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    def nothing() -> None:
        pass

    def kill(pid: Callable[[], int], number: signal.Signals) -> Callable[[], object]:
        return lambda: os.kill(pid(), number)

    head, peer, lab = laptop.head, laptop.peer, laptop.lab
    return [
        ("rank killed", kill(lambda: running.rank_of(peer), signal.SIGKILL), nothing),
        ("rank stopped (SIGSTOP)", kill(lambda: running.rank_of(head), signal.SIGSTOP), nothing),
        ("agent of the peer killed", kill(lambda: running.agent_of(peer), signal.SIGKILL), nothing),
        ("one rail dark", lambda: lab.cut(1), nothing),
        ("link dark", lab.cut, lab.heal),
        ("disk full at a checkpoint", peer.fill_disk, peer.free_disk),
        ("power of the peer", peer.power_off, peer.power_on),
    ]


def _row(running: Running, fault: Callable[[], object], mend: Callable[[], object]) -> str:
    attempt, seen, steps = running.attempt, len(running.events()), running.steps()
    began = time.monotonic()  # the hosts share this machine's steady clock
    fault()
    running.laptop.until(lambda: any(one["event"] == "verdict" for one in running.events()[seen:]), 90, "the verdict")
    mend()
    running.at_work(attempt + 1)
    back = time.monotonic() - began
    events = running.events()[seen:]
    verdict = next(one for one in events if one["event"] == "verdict")
    down = next(one for one in events if one["event"] == "ranks ended")
    taken = [entry["step"] for entry in running.laptop.metrics(running.job) if "loss" in entry]
    again = next((step for step in taken[steps:] if step <= max(taken[:steps], default=0)), None)
    lost = 0 if again is None else max(taken[:steps]) - again + 1
    return f"{verdict['clock'] - began:8.1f}s {down['clock'] - verdict['clock']:6.1f}s {back:6.1f}s {lost:6}"


if __name__ == "__main__":
    main()
