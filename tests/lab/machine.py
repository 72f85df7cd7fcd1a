"""The box of one host: its hardware, which lasts as long as the lab, and what a boot starts and a power cut ends."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import disk
from .cgroup import Cgroup
from .daemon import HERE, Daemon, python
from .disk import Identity
from .namespaces import popen_in
from .processes.facts import PORTS, Facts
from .processes.files import write_in_place
from .processes.room import JUMBO, MANAGEMENT, MANAGEMENT_BRIDGE

INTERFACES = tuple(interface for port in PORTS for interface in port)


@dataclass(frozen=True)
class Box:
    """How one host is built. Sizes in bytes; ``bind`` are folders seen read-only, ``models`` becomes /srv/models."""

    name: str
    side: int  # 0 or 1
    init: str  # simple or systemd
    workdir: Path
    cgroup: Cgroup
    disk: int
    rails: tuple[str, ...]  # the interfaces with a cable
    bind: tuple[Path, ...]
    models: Path | None


class Machine:
    """Power on, power off. Process ids are this machine's."""

    def __init__(self, box: Box, keeper_pid: int, room: Daemon) -> None:
        self.box, self.room = box, room
        self.pid = 0  # of the host's PID 1; 0 while it is off
        self.folder = box.workdir / box.name
        self.folder.mkdir()
        self._keeper_pid = keeper_pid
        self._boot: Daemon | None = None
        self._visitors: set[subprocess.Popen[Any]] = set()
        limit, usage = box.cgroup.limit or 0, box.cgroup.usage or Path("/")
        private = ["unshare", "--net", "--mount", "--propagation", "private", "--"]
        argv = [*python("hardware"), self.folder, box.disk, limit, usage]
        self.hardware = Daemon([*private, *map(str, argv)], self.console, within=keeper_pid)

    @property
    def console(self) -> Path:
        """What the host's boot and hardware print."""
        return self.box.workdir / f"{self.box.name}.log"

    @property
    def disk(self) -> Path:
        """The hardware's folder, mounted only in its own namespace, as seen from this machine."""
        return Path(f"/proc/{self.hardware.pid}/root{self.folder}")

    def format(self, identity: Identity, facts: Facts) -> None:
        """Write the disk of a new host."""
        self.hardware.wait_ready()
        disk.write(disk.render(identity, facts), self.disk / "up")
        self.write_facts(facts)

    def write_facts(self, facts: Facts) -> None:
        (self.disk / "facts" / "facts.json").write_text(facts.to_json())
        self.hardware.ask("refresh")

    def write_skew(self, skew: bytes) -> None:
        write_in_place(self.disk / "facts" / "skew", skew)

    def boot(self) -> None:
        """Start a boot; ``hand_over`` completes it. Two halves, so that two hosts can boot at once."""
        box = self.box
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", *(["--cgroup"] if box.cgroup.unified else [])]
        argv = [
            *("nsenter", f"--mount=/proc/{self.hardware.pid}/ns/mnt", "--"),
            *("unshare", *spaces, "--fork", "--kill-child", "--propagation", "private", "--"),
            *("bash", HERE / "processes" / "hostinit.sh", box.name, self.folder, box.init, box.models or ""),
            *box.bind,
        ]
        entered = box.cgroup.enter(list(map(str, argv)))
        self._boot = Daemon(entered, self.console, within=self._keeper_pid, ready="mounted")

    def hand_over(self) -> None:
        """Plug the cables in and let the host's own init take over."""
        assert self._boot
        self._boot.wait_ready()
        pid = self._boot.pid
        self._plug_in(pid)
        self.room.ask("host", self.box.side, pid)
        self.hardware.ask("attach", pid)
        self._boot.ask("go on")
        self.pid = pid

    def power_off(self) -> None:
        """As a plug would: the cables go dark first, so no farewell escapes; then the kernel kills everything at once."""
        assert self._boot
        pid, self.pid = self.pid, 0
        self.room.ask("dark", self.box.side)
        self.hardware.ask("detach")  # it must not keep the network namespace of the dead
        if _alive(pid):
            os.kill(pid, signal.SIGKILL)
        self._boot.wait(30, self.reap)
        self._in_room([f"link del {self.box.side}-{interface}" for interface in (MANAGEMENT, *INTERFACES)], force=True)

    def visit(self, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program among the host's processes, in its control groups."""
        self.reap()
        visitor = popen_in(
            self.pid, self.box.cgroup.enter(argv, inside=True), start_new_session=True, cwd="/", **options
        )
        self._visitors.add(visitor)
        return visitor

    def reap(self) -> None:
        """Take note of our children that have ended: unreaped, they would keep their process namespace from ending."""
        self._visitors -= {visitor for visitor in list(self._visitors) if visitor.poll() is not None}
        self.hardware.process.poll()
        if self._boot:
            self._boot.process.poll()

    def _plug_in(self, pid: int) -> None:
        """New cables for each boot: whatever the last one did to its interfaces went with its network namespace."""
        side = self.box.side
        lines = []
        for number, interface in enumerate((MANAGEMENT, *INTERFACES)):
            far = f"{side}-{interface}"
            mac = f"02:5a:00:00:{side + 1:02x}:{number:02x}"  # given, else `netplan apply` would change a random one
            lines.append(f"link add name {far} type veth peer name {interface} address {mac} netns {pid}")
        lines.append(f"link set {side}-{MANAGEMENT} master {MANAGEMENT_BRIDGE}")
        lines += [
            f"link set {side}-{name} mtu {JUMBO} master rail{number}" for number, name in enumerate(self.box.rails)
        ]
        self._in_room(lines)

    def _in_room(self, lines: list[str], *, force: bool = False) -> None:
        ip_in(self.room.pid, lines, force=force)


def ip_in(pid: int, lines: list[str], *, force: bool = False) -> None:
    """Run lines of ``ip -batch`` in the network namespace of ``pid``; ``force`` goes on after one that fails."""
    argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "--", "ip", *(["-force"] if force else []), "-batch", "-"]
    subprocess.run(argv, input="\n".join(lines) + "\n", text=True, check=not force, capture_output=True)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
