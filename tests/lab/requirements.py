"""What a lab needs of this machine."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from . import cgroup

PACKAGES = Path(__file__).with_name("packages.txt")

TRIAL = """\
try() { "$@" >/dev/null 2>&1 || { echo "$*"; exit 1; }; }
try mount -t tmpfs tmpfs /mnt
mkdir /mnt/up /mnt/work /mnt/root
try mount -t overlay o -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work /mnt/root
try mount -t sysfs sysfs /mnt/root/sys
try mount -t tmpfs tmpfs /mnt/root/sys/class
try ip link add name one type veth peer name two
try ip link add name bridge0 type bridge
try tc qdisc add dev one root tbf rate 1mbit burst 20000 latency 50ms
"""
"""What the lab asks of the kernel, tried in namespaces of its own; prints the first command that failed."""


@functools.cache
def missing() -> str | None:
    """In one line, the first thing that this machine lacks; None when it lacks nothing."""
    lack = next(_lacks(), None)
    return lack and f"the simulated pair needs {lack}"


def _lacks() -> Iterator[str]:
    """Each lack in turn; whoever asks for the next knows that the ones before are mended."""
    if sys.platform != "linux":
        yield "Linux"
    if os.geteuid():
        yield "root"
    if not shutil.which("dpkg-query"):
        yield "Debian or Ubuntu"
    if absent := _packages() - _installed():
        yield f"Debian packages, which tests/lab/install.sh installs: {' '.join(sorted(absent))}"
    for folder in ("/etc", "/usr", "/var"):
        if Path(folder).is_mount():
            yield f"{folder} on the root file system, not on one of its own"
    if cgroup.hierarchies().unified is None:
        yield "cgroup version 2, alone or beside version 1"
    spaces = ["--net", "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--fork", "--propagation", "private"]
    trial = subprocess.run(["unshare", *spaces, "--", "sh", "-c", TRIAL], capture_output=True, text=True, check=False)
    if trial.returncode:
        yield f"a kernel that can: {trial.stdout.strip() or trial.stderr.strip()}"


def _packages() -> set[str]:
    return {line.split("#")[0].strip() for line in PACKAGES.read_text().splitlines()} - {""}


def _installed() -> set[str]:
    shown = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package}\n"]
    lines = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.removeprefix("installed ") for line in lines if line.startswith("installed ")}
