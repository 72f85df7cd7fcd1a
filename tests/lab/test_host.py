"""A simulated host is one to those who look in, and anything may happen to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from tests.lab import Host, Lab, eventually

REPO = Path(__file__).parents[2]


def line(stream: IO[str] | None) -> str:
    assert stream
    return stream.readline()


# Looking in.


def test_run_takes_a_user_input_and_a_status(pair: Lab) -> None:
    host = pair.hosts[0]
    assert host.run(["cat"], input="a b").stdout == "a b"
    assert host.run(["id", "-un"]).stdout == "spark\n"
    assert host.run(["id", "-un"], "root").stdout == "root\n"
    assert host.run(["sh", "-c", "exit 3"], check=False).returncode == 3
    with pytest.raises(subprocess.CalledProcessError):
        host.run(["false"])


def test_a_run_out_of_time_leaves_no_process(pair: Lab) -> None:
    host = pair.hosts[0]
    with pytest.raises(subprocess.TimeoutExpired):
        host.run(["sh", "-c", "sleep 4321 & sleep 4321"], timeout=0.3)
    eventually(lambda: not any("4321" in process.argv for process in host.processes()))


def test_files_are_written_and_read_back(pair: Lab) -> None:
    host = pair.hosts[0]
    host.write("/home/spark/a folder/file", b"\0\1", mode=0o600)
    assert host.read("/home/spark/a folder/file") == b"\0\1"
    assert host.run(["stat", "-c", "%U %a", "/home/spark/a folder/file"]).stdout == "spark 600\n"
    with pytest.raises(FileNotFoundError):
        host.read("/nowhere")


def test_processes_are_the_hosts_own_and_can_be_signalled(pair: Lab) -> None:
    host, other = pair.hosts
    sleeper = host.start(["sleep", "1234"])
    eventually(lambda: any(process.argv == ("sleep", "1234") for process in host.processes()))
    (pid,) = [process.pid for process in host.processes() if process.argv == ("sleep", "1234")]
    assert pid == sleeper.pid
    assert pid in host.pids()
    assert pid not in other.pids()
    os.kill(pid, signal.SIGKILL)
    assert sleeper.wait(5) == -signal.SIGKILL


def test_a_bound_environment_runs_on_the_hosts_and_is_read_only(pair: Lab) -> None:
    host = pair.hosts[0]
    assert host.run([f"{sys.prefix}/bin/python", "-c", "import yaml; print(yaml.__name__)"]).stdout == "yaml\n"
    assert host.run(["touch", f"{sys.prefix}/mark"], "root", check=False).returncode


def test_a_host_has_nothing_of_this_machines_and_cannot_change_it(pair: Lab) -> None:
    host = pair.hosts[0]
    assert host.run(["test", "-e", REPO / "pyproject.toml"], check=False).returncode
    for forbidden in ("date -s @0", "echo 1 > /proc/sys/vm/swappiness", "mknod /tmp/disk b 254 0"):
        assert host.run(["sh", "-c", forbidden], "root", check=False).returncode, forbidden
    host.run(["sh", "-c", "echo 3 > /proc/sys/vm/drop_caches && sysctl -q -w net.ipv4.tcp_sack=1"], "root")


# What may happen to it.


def test_sshd_can_die_with_its_sessions_and_come_back(pair: Lab, simple: Lab) -> None:
    for lab in (pair, simple):
        host = lab.hosts[0]
        argv = ["ssh", "-F", str(lab.ssh_config), host.name, "echo in; sleep 100"]
        session = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert line(session.stdout) == "in\n"
        host.sshd(False)
        assert session.wait(5) == 255
        assert "refused" in lab.ssh(host, "true").stderr
        host.sshd(True)
        assert lab.ssh(host, "true").returncode == 0


def test_sudo_can_want_a_password(pair: Lab) -> None:
    host = pair.hosts[0]
    host.sudo_password("open sesame")
    assert pair.ssh(host, "sudo -n true").returncode
    assert pair.ssh(host, "sudo -S -p '' id -u", input="open sesame\n").stdout == "0\n"
    host.sudo_password(None)
    assert pair.ssh(host, "sudo -n true").returncode == 0


def test_a_changed_host_key_is_noticed_until_trusted(simple: Lab) -> None:
    host = simple.hosts[1]
    host.change_host_key()
    assert "HOST IDENTIFICATION HAS CHANGED" in simple.ssh(host, "true").stderr
    simple.trust()
    assert simple.ssh(host, "true").returncode == 0


def test_a_full_disk_refuses_and_recovers(pair: Lab) -> None:
    host = pair.hosts[0]
    host.fill_disk()
    assert "No space left" in host.run(["sh", "-c", "head -c 100000 /dev/zero > big"], check=False).stderr
    host.free_disk()
    host.run(["sh", "-c", "head -c 100000 /dev/zero > big"])


def test_a_skewed_clock_is_wrong_everywhere_on_one_host(pair: Lab) -> None:
    host, other = pair.hosts
    host.skew_clock(0)
    watch = "import sys, time\nfor _ in sys.stdin: print(time.time(), time.monotonic(), flush=True)"
    running = host.start(["python3", "-c", watch], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask() -> list[float]:
        running.stdin.write("\n")  # type: ignore[union-attr]
        running.stdin.flush()  # type: ignore[union-attr]
        return [float(word) for word in line(running.stdout).split()]

    wall, monotonic = ask()
    host.skew_clock(600)
    for command in ("date +%s", "sudo date +%s", "systemd-run --user --wait --pipe -q date +%s"):
        assert 590 < float(pair.ssh(host, command).stdout) - time.time() < 601
    assert abs(float(other.run(["date", "+%s"]).stdout) - time.time()) < 3
    later, then = ask()
    assert abs((later - wall) - (then - monotonic) - 600) < 0.5, "a running program sees the skew, its time-outs do not"
    nap = "import threading, time; t = time.monotonic(); time.sleep(.1); threading.Event().wait(.1); print(time.monotonic() - t)"
    assert 0.2 <= float(host.run(["python3", "-c", nap]).stdout) < 2
    host.reboot()
    assert 590 < float(pair.ssh(host, "date +%s").stdout) - time.time() < 601
    host.skew_clock(0)
    assert abs(float(pair.ssh(host, "date +%s").stdout) - time.time()) < 3


def test_memory_is_limited_and_told(pair: Lab) -> None:
    host, other = pair.hosts
    assert re.search(r"MemTotal: +1048576 kB", host.read("/proc/meminfo").decode())
    grow = "b = [bytearray(b'x') * (64 << 20) for _ in range(8)]; print('grown', flush=True); input()"
    growing = host.start(["python3", "-c", grow], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert line(growing.stdout) == "grown\n"
    eventually(lambda: available(host) < 600_000)
    assert available(other) > 700_000
    growing.communicate("\n", 5)
    burst = host.run(["python3", "-c", "b = bytearray(b'x') * (2 << 30)"], check=False)
    assert burst.returncode == -signal.SIGKILL
    assert host.on


def available(host: Host) -> int:
    """MemAvailable, kB."""
    lines = dict(text.split(":") for text in host.read("/proc/meminfo").decode().splitlines())
    return int(lines["MemAvailable"].split()[0])
