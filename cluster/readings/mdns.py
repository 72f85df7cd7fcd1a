"""What answers on the network to a search for SSH servers. mDNS can be spoofed: names to choose from, never to trust."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address


@dataclass(frozen=True)
class Announced:
    """An SSH server that announces itself: the interface it was heard on, its service's name, host name and address."""

    interface: str
    name: str
    host: str
    address: IPv4Address
    port: int


def avahi_browse(text: str) -> tuple[Announced, ...]:
    """Read `avahi-browse -p -r -f -t _ssh._tcp`: its resolved (`=`) IPv4 lines, each once, in their order.

    Names come with `\\DDD` for each byte that is not a letter, digit, `-` or `_`. What is no proper host name or address is
    left out, and so is what would talk to the terminal.
    """
    found = [_announced([_unescaped(field) for field in line.split(";")]) for line in text.splitlines()]
    return tuple(dict.fromkeys(one for one in found if one is not None))


def _announced(fields: list[str]) -> Announced | None:
    if len(fields) < 9 or fields[0] != "=" or fields[2] != "IPv4":
        return None
    _, interface, _, name, _, _, host, address, port, *_ = fields
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", host) or not re.fullmatch(r"\d{1,5}", port):
        return None
    if not (name.isprintable() and interface.isprintable() and 0 < int(port) < 65536):
        return None
    try:
        return Announced(interface, name, host, IPv4Address(address), int(port))
    except ValueError:
        return None


def _unescaped(field: str) -> str:
    raw = re.sub(rb"\\(\d{3}|.)", _byte, field.encode("utf-8", "replace"))
    return raw.decode("utf-8", "replace")


def _byte(found: re.Match[bytes]) -> bytes:
    return bytes([int(found[1]) & 0xFF]) if len(found[1]) == 3 else found[1]
