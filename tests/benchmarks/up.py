"""`sparkctl up`, first and again, beside ansible-core doing the same facts, file and MTU on the same two simulated hosts.

sudo .venv/bin/python -m tests.benchmarks.up [--repeats N]

ansible-core gets a virtual environment of its own, in a folder that is removed afterwards. Everything runs as a user would run it:
a process from its start to its end. Needs root, for the hosts (tests/lab), and a package index.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

from cluster import netplan
from cluster.code import own
from tests.lab import Lab, eventually


def main() -> None:
    """Print a table of seconds: medians of the repeats."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if missing := Lab.missing():
        sys.exit(missing)
    with tempfile.TemporaryDirectory() as folder, Lab(bind=[sys.prefix]) as lab:
        for host in lab.hosts:
            eventually(lambda host=host: "default" in host.run(["ip", "-4", "route"]).stdout, 20, "the default route")
        ours = Ours(lab, frozen(Path(folder) / "code"))
        rows = [ours.once() for _ in range(options.repeats)]
        ansible = Ansible(lab, Path(folder), ours.text)
        theirs = [ansible.once() for _ in range(options.repeats)]
    show(rows, theirs)


def frozen(folder: Path) -> Path:
    """The code as it is now: an edit while this runs would be another version, which `up` ships anew."""
    for path, content in own().files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def show(ours: Sequence[tuple[float, float, float]], theirs: Sequence[tuple[float, float]]) -> None:
    """The table: seconds, and how many times ours."""
    first, measuring, again = (statistics.median(column) for column in zip(*ours, strict=True))
    their_first, their_again = (statistics.median(column) for column in zip(*theirs, strict=True))
    print(f"two hosts, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, medians of {len(ours)}; seconds")
    print(f"{'':<34}{'sparkctl up':>12}{'ansible-core':>14}{'ratio':>8}")
    print(f"{'first (facts, file, MTU; ours more)':<34}{first:>12.1f}{their_first:>14.1f}{their_first / first:>8.1f}")
    print(f"{'again, nothing to change':<34}{again:>12.1f}{their_again:>14.1f}{their_again / again:>8.1f}")
    print(f"{'measuring the link, all-reduce too':<34}{measuring:>12.1f}{'-':>14}")


class Ours:
    """sparkctl on a lab."""

    def __init__(self, lab: Lab, code: Path) -> None:
        self._lab = lab
        self.text = ""  # of the head's netplan file, and so what ansible is to write
        python = f"python: {sys.prefix}/bin/python, identity_file"
        lab.inventory_file.write_text(lab.inventory().replace("identity_file", python))
        self._environment = {
            **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
            "HOME": str(lab.home),
            "PYTHONPATH": str(code),
        }

    def once(self) -> tuple[float, float, float]:
        """Seconds: to make the pair, to measure its link, and to find that nothing is to be done. Then it is undone."""
        began = time.monotonic()
        measured = 0.0
        argv = [sys.executable, "-m", "sparkctl", "up", "--yes", "-i", str(self._lab.inventory_file)]
        with subprocess.Popen(argv, env=self._environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if "measure the link" in line:
                    measured = time.monotonic()
        ended = time.monotonic()
        assert process.returncode == 0
        assert measured
        self.text = self._lab.hosts[0].read(netplan.PATH).decode()
        again = timed([*argv[:4], *argv[5:]], self._environment)
        timed([sys.executable, "-m", "sparkctl", "down", "--purge", "-i", argv[-1]], self._environment)
        return measured - began, ended - measured, again


class Ansible:
    """ansible-core on a lab: gathers facts, writes a netplan file as root, applies it and sets the MTU."""

    def __init__(self, lab: Lab, folder: Path, text: str) -> None:
        self._lab = lab
        venv.create(folder / "venv", with_pip=True)
        pip = [str(folder / "venv/bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "ansible-core"], check=True)
        hosts = "".join(f"{host.name} octet={10 + rank}\n" for rank, host in enumerate(lab.hosts))
        (folder / "hosts").write_text(f"[sparks]\n{hosts}[sparks:vars]\nansible_python_interpreter=/usr/bin/python3\n")
        (folder / "40-cx7.yaml.j2").write_text(text.replace(".10/24", ".{{ octet }}/24"))
        (folder / "play.yaml").write_text(json.dumps([self._play()]))
        (folder / "ansible.cfg").write_text(
            f"[defaults]\ninventory = {folder}/hosts\nlocal_tmp = {folder}/tmp\n"
            f"[ssh_connection]\npipelining = True\nssh_args = -F {lab.ssh_config} -o ControlMaster=auto -o ControlPersist=60s\n"
        )
        self._argv = [str(folder / "venv/bin/ansible-playbook"), str(folder / "play.yaml")]
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(lab.home), "LANG": "C.UTF-8"}
        self._environment["ANSIBLE_CONFIG"] = str(folder / "ansible.cfg")

    def _play(self) -> dict[str, object]:
        rails = self._lab.hosts[0].rails
        file = {"src": "40-cx7.yaml.j2", "dest": netplan.PATH, "mode": "0600"}
        set_mtu = "ip link set dev {{ item }} mtu 9000"
        look = "cat /sys/class/net/{{ item }}/mtu"
        return {
            "hosts": "sparks",
            "become": True,
            "tasks": [
                {"command": look, "loop": list(rails), "register": "mtu", "changed_when": False},
                {
                    "command": set_mtu,
                    "loop": list(rails),
                    "when": "'9000' not in mtu.results | map(attribute='stdout')",
                },
                {"template": file, "register": "file"},
                {"command": "netplan apply", "when": "file.changed"},
            ],
        }

    def once(self) -> tuple[float, float]:
        """Seconds, with something to change and without. Then it is undone."""
        seconds = timed(self._argv, self._environment), timed(self._argv, self._environment)
        for host in self._lab.hosts:
            host.run(["rm", netplan.PATH], "root")
            host.run(["netplan", "apply"], "root")
            for rail in host.rails:
                host.run(["ip", "link", "set", "dev", rail, "mtu", "1500"], "root")
        return seconds


def timed(argv: Sequence[str], environment: dict[str, str]) -> float:
    """Seconds that a command takes from start to end."""
    began = time.monotonic()
    done = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(argv)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.monotonic() - began


if __name__ == "__main__":
    main()
