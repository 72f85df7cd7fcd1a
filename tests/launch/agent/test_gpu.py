"""The GPU's clock and temperature while a job runs: from what nvidia-smi prints, on a real program's output."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import probe
from cluster.readings.box import gpus
from launch.agent import gpu as watching
from launch.agent.gpu import AGREE, GpuWatch, Steady, trouble
from tests.commandline import wait_for

COLUMNS = f"{probe.GPU_COLUMNS},clocks_event_reasons.active"
# As a GB10 prints it while it works (facts of the DGX Spark): no memory, and everything else.
BUSY = {
    "name": "NVIDIA GB10",
    "memory.total": "[N/A]",
    "driver_version": "580.126.09",
    "temperature.gpu": "71",
    "utilization.gpu": "96 %",
    "power.draw": "88.10 W",
    "clocks.current.sm": "2411 MHz",
    "clocks.max.sm": "3003 MHz",
    "pstate": "P0",
    "clocks_event_reasons.active": "0x0000000000000000",
}


def table(**changes: str) -> str:
    """nvidia-smi's table; `changes` by the column's name with _ for dots."""
    row = BUSY | {name: changes[key] for name in BUSY if (key := name.replace(".", "_")) in changes}
    names = COLUMNS.split(",")
    return f"{', '.join(names)}\n{', '.join(row.get(name, '[N/A]') for name in names)}\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"utilization_gpu": "0 %", "clocks_current_sm": "208 MHz", "power_draw": "4.10 W"}, ""),  # idle
        ({"utilization_gpu": "[N/A]"}, ""),
        (
            {
                "clocks_current_sm": "507 MHz",
                "power_draw": "13.90 W",
                "clocks_event_reasons_active": "0x0000000000000004",
            },
            "node spark-b: NVIDIA GB10 runs at 507 MHz at 96 %, 14 W, and not for heat: its power supply holds it down; "
            "on spark-b: `sudo poweroff`, then unplug the power brick",
        ),
        (
            {
                "temperature_gpu": "94",
                "clocks_current_sm": "1404 MHz",
                "clocks_event_reasons_active": "0x0000000000000040",
            },
            "node spark-b: NVIDIA GB10 is slowed down to 1404 MHz by heat, 94 degrees; give the box air",
        ),
    ],
)
def test_a_low_clock_and_heat_are_told_and_an_idle_gpu_is_not(changes: dict[str, str], said: str) -> None:
    found = trouble("spark-b", gpus(table(**changes)))
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_one_look_says_nothing_and_one_good_look_takes_it_back() -> None:
    steady = Steady()
    for _ in range(AGREE - 1):
        steady.look("slow")
        assert steady.warning == ""
    steady.look("slow, in other words")
    steady.look("slow")
    assert steady.warning == "slow, in other words"
    steady.look("")
    assert steady.warning == ""


@pytest.mark.timeout(60)
def test_the_watch_asks_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = tmp_path / "table"
    shown.write_text(table(clocks_current_sm="507 MHz", power_draw="13.90 W"))
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat {shown}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(watching, "EVERY", 0.1)
    watch = GpuWatch("spark-a")
    wait_for(lambda: watch.warning, 30)
    assert "507 MHz at 96 %" in watch.warning
    shown.write_text(table())
    wait_for(lambda: not watch.warning, 30)
