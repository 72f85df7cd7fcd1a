"""The wire room: a network namespace between the two hosts that holds the far end of each of their cables.

    room RAIL0_AT_HOST0,RAIL0_AT_HOST1 ...

A veth's carrier is on when its far end is up, and the far ends are here: so a cable can be cut, and a host can lose power,
with each host's own interface left alone, as with real cables. This process owns which far ends are up. It watches the
hosts' interfaces too: taking one down darkens the other end of its cable.

Far ends are named SIDE-INTERFACE. Reads one command a line on stdin and answers each with ``ok`` or ``error: WHY``:

    host SIDE PID      the host's network namespace is that of PID and its cables are plugged in
    dark SIDE          the host has lost power
    cut RAIL | heal RAIL
    management SIDE on|off
    slow RAIL MBIT     0 takes the limit off
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
from pathlib import Path

from .files import drain

MANAGEMENT = "enP7s7"
MANAGEMENT_BRIDGE = "management"
LAPTOP = "laptop"  # the far end of the lab's one interface on this machine
JUMBO = 9216  # what a switch port carries; a host's own MTU is the host's affair

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1  # linux/sockios.h, linux/if.h
RTMGRP_LINK = 1  # linux/rtnetlink.h


def is_up(inside: socket.socket, interface: str) -> bool:
    """Whether an interface of the socket's network namespace is administratively up."""
    return bool(_flags(inside, interface) & IFF_UP)


def set_up(inside: socket.socket, interface: str, up: bool) -> None:
    flags = _flags(inside, interface)
    wanted = flags | IFF_UP if up else flags & ~IFF_UP
    if wanted != flags:
        fcntl.ioctl(inside, SIOCSIFFLAGS, struct.pack("16sH14x", interface.encode(), wanted & 0xFFFF))


def _flags(inside: socket.socket, interface: str) -> int:
    answer = fcntl.ioctl(inside, SIOCGIFFLAGS, struct.pack("16sH14x", interface.encode(), 0))
    flags: int = struct.unpack_from("H", answer, 16)[0]
    return flags


class NetworkView:
    """Sockets that stay in another network namespace: one to ask, one that wakes us when a link there changes."""

    def __init__(self, pid: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        try:
            if libc.setns(there, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            self.ask = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            self.events.bind((0, RTMGRP_LINK))
            self.events.setblocking(False)
        finally:
            libc.setns(home, CLONE_NEWNET)
            os.close(home)
            os.close(there)

    def close(self) -> None:
        self.ask.close()
        self.events.close()


class Room:
    """What the cables are meant to be, and the one act that makes them so."""

    def __init__(self, rails: list[tuple[str, str]]) -> None:
        self.rails = rails
        self.here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.views: dict[int, NetworkView] = {}  # of the hosts with power
        self.cut: set[int] = set()
        self.unmanaged: set[int] = set()  # hosts cut off the management network
        self.slowed: dict[int, int] = {}  # rail: Mbit/s, 0 for no limit

    def build(self) -> None:
        lines = ["link set lo up"]
        for bridge in (MANAGEMENT_BRIDGE, *(f"rail{number}" for number in range(len(self.rails)))):
            lines += [f"link add name {bridge} type bridge mcast_snooping 0", f"link set {bridge} up"]
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")  # a cable says nothing of its own
        ip(lines)

    def settle(self) -> None:
        """Raise and lower the far ends until they are as they should be."""
        for side, view in self.views.items():
            self.light(side, MANAGEMENT, side not in self.unmanaged)
            drain(view.events)
        for number, rail in enumerate(self.rails):
            whole = number not in self.cut and len(self.views) == 2
            for side in self.views:
                other = 1 - side
                lit = whole and _is_up_there(self.views[other], rail[other])
                self.light(side, rail[side], lit)

    def light(self, side: int, interface: str, on: bool) -> None:
        """Whether a host's interface has carrier, which its far end gives it."""
        try:
            set_up(self.here, f"{side}-{interface}", on)
        except OSError as error:
            if error.errno != errno.ENODEV:  # the host has removed its own end, and this one with it
                raise

    def plug_in(self, side: int, pid: int) -> None:
        self.views[side] = NetworkView(pid)
        for number in self.slowed:
            self.shape(side, number)

    def darken(self, side: int) -> None:
        for interface in (MANAGEMENT, *(rail[side] for rail in self.rails)):
            self.light(side, interface, False)
        self.views.pop(side).close()  # an open socket would keep the dead host's network namespace

    def slow(self, number: int, mbit: int) -> None:
        self.slowed[number] = mbit
        for side in self.views:
            self.shape(side, number)

    def shape(self, side: int, number: int) -> None:
        """Limit what a rail carries towards a host: a token bucket at the far end, where the host cannot see it."""
        device, mbit = f"{side}-{self.rails[number][side]}", self.slowed[number]
        burst = max(mbit * 500, 4 * JUMBO)  # bytes: 4 ms at that rate
        limit = ["tbf", "rate", f"{mbit}mbit", "burst", str(burst), "latency", "50ms"] if mbit else ["noqueue"]
        subprocess.run(["tc", "qdisc", "replace", "dev", device, "root", *limit], check=True)

    def obey(self, verb: str, *words: str) -> None:
        match verb, words:
            case "host", (side, pid):
                self.plug_in(int(side), int(pid))
            case "dark", (side,):
                self.darken(int(side))
            case "cut", (number,):
                self.cut.add(int(number))
            case "heal", (number,):
                self.cut.discard(int(number))
            case "management", (side, "on"):
                self.unmanaged.discard(int(side))
            case "management", (side, "off"):
                self.unmanaged.add(int(side))
            case "slow", (number, mbit):
                self.slow(int(number), int(mbit))
            case _:
                raise ValueError(f"unknown command {verb} {words}")

    def serve(self) -> None:
        """Obey until stdin ends."""
        while True:
            watched = [sys.stdin.fileno(), *(view.events.fileno() for view in self.views.values())]
            ready, _, _ = select.select(watched, [], [])
            answer = ""
            if sys.stdin.fileno() in ready:
                line = sys.stdin.readline()
                if not line:
                    return
                answer = self.answer(line)
            self.settle()
            if answer:
                print(answer, flush=True)

    def answer(self, line: str) -> str:
        try:
            self.obey(*line.split())
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            return f"error: {error}"
        return "ok"


def _is_up_there(view: NetworkView, interface: str) -> bool:
    try:
        return is_up(view.ask, interface)
    except OSError:  # the host has renamed or removed it
        return False


def ip(lines: list[str]) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True)


def main() -> None:
    room = Room([(at_0, at_1) for at_0, _, at_1 in (rail.partition(",") for rail in sys.argv[1:])])
    room.build()
    print("ready", flush=True)
    room.serve()
