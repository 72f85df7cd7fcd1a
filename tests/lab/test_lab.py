"""A lab can be reached from this machine, and leaves nothing on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
import yaml

from tests.lab import Lab, eventually, requirements
from tests.lab.cgroup import hierarchies

REPO = Path(__file__).parents[2]


# Reaching it.


def test_hosts_answer_over_ssh_with_their_own_names(pair: Lab) -> None:
    for host in pair.hosts:
        answer = pair.ssh(host, "hostname; sudo -n id -u; systemctl --user is-system-running --wait")
        assert answer.stdout.split() == [host.name, "0", "running"], answer.stderr


def test_inventory_names_both_hosts_with_the_laptops_key(pair: Lab) -> None:
    nodes = yaml.safe_load(pair.inventory())["nodes"]
    assert [(node["name"], node["host"]) for node in nodes] == [(host.name, host.address) for host in pair.hosts]
    assert {node["identity_file"] for node in nodes} == {str(pair.identity_file)}
    assert pair.identity_file.exists()


def test_a_home_may_have_spaces_in_its_name(simple: Lab) -> None:
    assert simple.ssh(simple.hosts[0], "pwd; echo $HOME").stdout == "/home/spark of ours\n" * 2


def test_models_lie_on_a_folder_of_each_host_that_stays(tmp_path: Path) -> None:
    with Lab(init="simple", models=tmp_path) as lab:
        lab.hosts[0].run(["sh", "-c", "echo weights > /srv/models/a"])
        assert lab.hosts[1].run(["ls", "/srv/models"]).stdout == ""
    assert (tmp_path / "spark-a" / "a").read_text() == "weights\n"


def test_two_labs_at_once_have_each_their_own_network(pair: Lab, simple: Lab) -> None:
    assert len({host.address.rpartition(".")[0] for lab in (pair, simple) for host in lab.hosts}) == 2
    assert pair.hosts[0].run(["ping", "-c1", "-W1", simple.hosts[0].address], check=False).returncode


# Leaving nothing.


def traces(home: Path) -> list[Path]:
    """What is there of the lab with this home: its folder and its control groups."""
    name = home.parent.name
    roots = [root for root in (hierarchies().unified, hierarchies().memory) if root]
    return [
        path for path in (home.parent, *(group for root in roots for group in root.glob(f"{name}*"))) if path.exists()
    ]


def interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def alive(pids: list[str]) -> bool:
    return any(Path(f"/proc/{pid}").exists() for pid in pids)


def words(stream: IO[str] | None) -> list[str]:
    assert stream
    return stream.readline().split()


OWNER = """\
import time
from tests.lab import Lab
lab = Lab().up()
print(lab.home, lab._keeper.pid, lab._interface, *(pid for host in lab.hosts for pid in host.pids()), flush=True)
time.sleep(1000)
"""


def test_a_lab_goes_down_without_a_trace() -> None:
    before = interfaces()
    with Lab(init="simple") as lab:
        lab.hosts[0].start(["sleep", "1000"])
        home, pids = lab.home, [str(pid) for host in lab.hosts for pid in host.pids()]
        assert interfaces() != before
    assert not traces(home)
    assert interfaces() == before
    assert not alive(pids)


def test_nothing_outlives_a_killed_owner() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=REPO)
    home, _, interface, *pids = words(owner.stdout)
    assert traces(Path(home))
    owner.kill()
    owner.wait()
    eventually(lambda: not alive(pids))
    eventually(lambda: not traces(Path(home)))
    eventually(lambda: interface not in interfaces())


def test_what_a_killed_keeper_leaves_is_swept_at_the_next_start(simple: Lab) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=REPO)
    home, keeper, interface, *pids = words(owner.stdout)
    os.kill(int(keeper), signal.SIGKILL)
    owner.kill()
    owner.wait()
    eventually(lambda: not alive(pids))
    eventually(lambda: interface not in interfaces())
    assert traces(Path(home))
    with Lab(init="simple"):
        assert not traces(Path(home))
    assert simple.ssh(simple.hosts[0], "true").returncode == 0, "a living lab was swept"


def test_make_lab_boots_a_pair_until_interrupted() -> None:
    argv = [sys.executable, "-m", "tests.lab", "--network", "networkd"]
    running = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=REPO)
    inventory = Path(words(running.stdout)[-1])
    command = words(running.stdout)[1:]
    assert yaml.safe_load(inventory.read_text())["nodes"][0]["name"] == "spark-a"
    assert subprocess.run([*command, "hostname"], capture_output=True, text=True, check=True).stdout == "spark-a\n"
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    assert running.returncode == 0
    assert not traces(inventory.parent)


# What it needs.


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    requirements.missing.cache_clear()
    try:
        assert Lab.missing() == "the simulated pair needs root"
    finally:
        requirements.missing.cache_clear()


def test_the_installer_is_quick_and_quiet_when_all_is_there() -> None:
    start = time.monotonic()
    done = subprocess.run([REPO / "tests/lab/install.sh"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert time.monotonic() - start < 5
