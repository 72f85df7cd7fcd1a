"""A host's hardware, on while the lab is: its disk, and the /sys and /proc files that its missing devices would show.

    hardware FOLDER DISK_BYTES LIMIT_BYTES USAGE_FOLDER

Mounts a tmpfs on FOLDER in its own mount namespace: the disk outlives the host's processes as a disk does a power cut.
Keeps the files under FOLDER/firmware true to ``facts.json`` and to the host's interfaces: a cut cable shows in the RoCE
devices as it would on a Spark. LIMIT_BYTES 0: no limit. Reads one command a line on stdin, answers each with ``ok``:

    attach PID   the host runs, in PID's network namespace
    detach       the host is off
    refresh      facts.json has changed
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

from . import firmware
from .facts import ROCE, Facts
from .files import drain, write_in_place

CLONE_NEWNET = 0x40000000
RTMGRP = 0x1 | 0x10 | 0x100  # links, IPv4 and IPv6 addresses (linux/rtnetlink.h)
TICK = 0.2  # s between two looks at the memory


class Hardware:
    """The files of one host's firmware; ``netlink`` wakes us when one of its interfaces changes."""

    def __init__(self, folder: Path, limit: int | None, usage: Path) -> None:
        self.folder, self.limit, self.usage = folder, limit, usage
        self.files: dict[Path, str] = {}  # what we last wrote
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.home = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.netlink: socket.socket | None = None
        self.facts = Facts()

    def attach(self, pid: str) -> None:
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        failed = self.libc.setns(namespace, CLONE_NEWNET)
        os.close(namespace)
        if failed:
            raise OSError(ctypes.get_errno(), "setns")
        self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self.netlink.bind((0, RTMGRP))
        self.netlink.setblocking(False)

    def detach(self) -> None:
        if self.netlink:
            self.netlink.close()
            self.netlink = None
            self.libc.setns(self.home, CLONE_NEWNET)

    def refresh(self) -> None:
        facts = self.facts = Facts.from_json((self.folder / "facts" / "facts.json").read_text())
        interfaces = look() if self.netlink else {}
        for name in ROCE:
            interfaces.setdefault(name, firmware.Interface(name, False, "00:00:00:00:00:00", ()))
        self.show("speed", firmware.speeds(facts, interfaces))
        self.show("infiniband", firmware.infiniband(facts, interfaces), replace=True)
        self.show("dmi", firmware.dmi(facts))
        proc = {"swaps": facts.swaps, "osrelease": f"{facts.kernel or os.uname().release}\n", "drop_caches": "0\n"}
        self.show("proc", proc)
        self.tick()

    def tick(self) -> None:
        used, cache = self.account() if self.limit else (0, 0)
        real = Path("/proc/meminfo").read_text()
        self.show("proc", {"meminfo": firmware.meminfo(real, self.facts, self.limit, used, cache)})

    def account(self) -> tuple[int, int]:
        """Bytes in use and bytes of page cache of the host's control group, of either version."""
        usage = self.usage / "memory.usage_in_bytes"
        version1 = usage.exists()
        used = int((usage if version1 else self.usage / "memory.current").read_text())
        stat = dict(line.split() for line in (self.usage / "memory.stat").read_text().splitlines())
        total = "total_" if version1 else ""
        return used, int(stat[f"{total}active_file"]) + int(stat[f"{total}inactive_file"])

    def show(self, folder: str, tree: dict[str, str], *, replace: bool = False) -> None:
        """Write files in place (they are bind-mounted into the host); ``replace``: and remove what is not in the tree."""
        root = self.folder / "firmware" / folder
        for path, text in ((root / name, text) for name, text in tree.items()):
            if self.files.get(path) == text:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            write_in_place(path, text.encode())
            self.files[path] = text
        if replace:
            for path in [path for path in self.files if path.is_relative_to(root)]:
                if str(path.relative_to(root)) not in tree:
                    path.unlink()
                    del self.files[path]

    def serve(self) -> None:
        """Obey, and follow the host's interfaces and memory, until stdin ends."""
        while True:
            watched = [sys.stdin.fileno()] + ([self.netlink.fileno()] if self.netlink else [])
            ready, _, _ = select.select(watched, [], [], TICK)
            if sys.stdin.fileno() in ready:
                line = sys.stdin.readline()
                if not line:
                    return
                self.obey(*line.split())
                print("ok", flush=True)
            elif self.netlink and ready:
                time.sleep(0.01)  # changes come in bursts
                drain(self.netlink)
                self.refresh()
            else:
                self.tick()

    def obey(self, verb: str, pid: str = "") -> None:
        match verb:
            case "attach":
                self.attach(pid)
            case "detach":
                self.detach()
        self.refresh()


def look() -> dict[str, firmware.Interface]:
    """The interfaces of the network namespace that we are in."""
    shown = subprocess.run(["ip", "-j", "addr", "show"], capture_output=True, text=True, check=True).stdout
    return {
        link["ifname"]: firmware.Interface(
            link["ifname"],
            "LOWER_UP" in link["flags"],
            link.get("address", ""),
            tuple(sorted((a["local"] for a in link["addr_info"]), key=lambda address: ":" not in address)),
        )
        for link in json.loads(shown)
    }


def main() -> None:
    folder, usage = Path(sys.argv[1]), Path(sys.argv[4])
    disk, limit = int(sys.argv[2]), int(sys.argv[3])
    options = f"size={disk},mode=755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "sparklab", str(folder)], check=True)
    for name in ("up", "facts", "firmware"):
        (folder / name).mkdir()
    os.umask(0o022)
    hardware = Hardware(folder, limit or None, usage)
    print("ready", flush=True)
    hardware.serve()
