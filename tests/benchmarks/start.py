"""How long the command line takes to start, and `plan` to plan a 405B model: beside the libraries that both are made of.

    python -m tests.benchmarks.start [--rounds 5]

Seconds of wall clock, medians; the three take turns, so that what else the machine does hits them alike.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

CONFIG = Path(__file__).parents[1] / "launch/configs/llama-3.1-405b.json"
RECIPE = "kind: inference\nbase_model: ./model\nquantization: nf4\nmax_num_seqs: 1\nmax_model_len: 4096\n"
HELP_BAR, PLAN_BAR = 0.15, 0.5  # seconds


def main() -> None:
    """Print the table."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    asked.add_argument("--rounds", type=int, default=5)
    rounds = asked.parse_args().rounds
    sparkctl = [sys.executable, "-m", "sparkctl"]
    ways = {
        "click, pydantic, PyYAML and rich imported": [
            sys.executable,
            "-c",
            "import click, pydantic.types, yaml, rich.console",
        ],
        "sparkctl --help": [*sparkctl, "--help"],
        "sparkctl plan, 405 B": [*sparkctl, "plan", "recipe.yaml", "--memory", "121.7"],
    }
    bars = dict(zip(ways, (None, HELP_BAR, PLAN_BAR), strict=True))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        shutil.copy(CONFIG, Path(folder) / "model/config.json")
        (Path(folder) / "recipe.yaml").write_text(RECIPE)
        for _ in range(rounds + 1):  # the first fills the page cache
            for name, argv in ways.items():
                taken[name].append(_seconds(argv, folder))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, medians of {rounds}")
    for name, found in taken.items():
        seconds, bar = median(found[1:]), bars[name]
        held = "" if bar is None else f"  <= {bar:.2f} s  {'ok' if seconds <= bar else 'ABOVE ITS BAR'}"
        print(f"  {name:44}{seconds:6.2f} s (best {min(found):.2f}){held}")


def _seconds(argv: list[str], folder: str) -> float:
    began = time.monotonic()
    # As on a user's machine: nothing is compiled twice.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # No time limit: with one, the end is noticed up to 50 ms late.
    subprocess.run(argv, cwd=folder, env=env, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
