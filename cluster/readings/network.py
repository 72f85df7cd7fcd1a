"""A node's network: addresses, routes, who configures which interface, who listens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, ip_interface
from typing import Any

Address = IPv4Interface | IPv6Interface


def _rows(text: str) -> list[dict[str, Any]] | None:
    """The objects of a JSON list; None where the text is none."""
    try:
        found = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return None
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else None


def _words(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""


def _interface(address: str, prefix: Any) -> Address | None:
    try:
        return ip_interface(f"{address}/{prefix}")
    except ValueError:
        return None


def addresses(text: str) -> dict[str, tuple[Address, ...]] | None:
    """Read `ip -j addr show`: each interface's addresses. None where it is no such text."""
    rows = _rows(text)
    if rows is None:
        return None
    return {_words(row, "ifname"): _addresses(row.get("addr_info")) for row in rows}


def _addresses(rows: Any) -> tuple[Address, ...]:
    found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    read = (_interface(_words(row, "local"), row.get("prefixlen")) for row in found)
    return tuple(address for address in read if address is not None)


@dataclass(frozen=True)
class Route:
    """An IPv4 route to a network, not to a single address of our own; `gateway` where it does not lie on the interface."""

    network: IPv4Network
    interface: str
    gateway: IPv4Address | None


def routes(text: str) -> tuple[Route, ...] | None:
    """Read `ip -j -4 route show table all`, unicast routes only. None where it is no such text."""
    rows = _rows(text)
    if rows is None:
        return None
    read = (_route(row) for row in rows if _words(row, "type") in ("", "unicast"))
    return tuple(route for route in read if route is not None)


def _route(row: Mapping[str, Any]) -> Route | None:
    to = _words(row, "dst")
    try:
        network = IPv4Network("0.0.0.0/0" if to == "default" else to)
        gateway = IPv4Address(_words(row, "gateway")) if row.get("gateway") else None
    except ValueError:
        return None
    return Route(network, _words(row, "dev"), gateway)


@dataclass(frozen=True)
class Neighbour:
    """Another machine that an interface has heard of; `mac` in lower case."""

    address: IPv4Address
    interface: str
    mac: str


def neighbours(text: str) -> tuple[Neighbour, ...]:
    """Read `ip -j -4 neigh show`; an address that did not answer has no MAC, and is left out."""
    found = []
    for row in _rows(text) or []:
        try:
            address = IPv4Address(_words(row, "dst"))
        except ValueError:
            continue
        if _words(row, "lladdr"):
            found.append(Neighbour(address, _words(row, "dev"), _words(row, "lladdr").lower()))
    return tuple(found)


def ethtool_speed(text: str) -> int | None:
    """Read `ethtool INTERFACE`: its speed in Mb/s; None for `Unknown!`, which is a link without a carrier."""
    found = re.search(r"^\s*Speed: (\d{1,9})Mb/s\s*$", text, re.MULTILINE)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Profile:
    """A configuration of one interface that outlives a reboot.

    `source` is the file that holds it, or that netplan generated it into; `addresses` are its static ones, in order.
    `mtu` is None where the profile sets none, or does not tell. `active`: it is what the interface now has. Of `interface`
    and `mac` (lower case) either may be empty.
    """

    manager: str  # NetworkManager or networkd
    name: str
    source: str
    interface: str
    mac: str
    addresses: tuple[IPv4Interface, ...]
    mtu: int | None
    active: bool


def nmcli_devices(text: str) -> dict[str, tuple[str, str]]:
    """Read `nmcli -t -f DEVICE,TYPE,STATE,CON-UUID device`: each device's state and its active profile's UUID, or ''."""
    rows = (_fields(line) for line in text.splitlines())
    return {row[0]: (row[2], row[3]) for row in rows if len(row) == 4}


def _fields(line: str) -> list[str]:
    """A line of `nmcli -t`: fields between colons, in which a colon or a backslash has a backslash before it."""
    return [field.replace("\\:", ":").replace("\\\\", "\\") for field in re.split(r"(?<!\\):", line)]


def nmcli_profiles(connections: str, profiles: str, active: Iterable[str]) -> tuple[Profile, ...]:
    """NetworkManager's profiles that last and start by themselves.

    Args:
        connections: `nmcli -t -f UUID,TYPE,FILENAME connection show`.
        profiles: `nmcli -t -f connection.uuid,... connection show UUID...`: blocks of `name:value`.
        active: the UUIDs of the active ones.
    """
    files = {row[0]: row[2] for row in (_fields(line) for line in connections.splitlines()) if len(row) == 3}
    blocks = (dict(_pair(line) for line in block.splitlines() if ":" in line) for block in profiles.split("\n\n"))
    on = set(active)
    return tuple(
        Profile(
            manager="NetworkManager",
            name=found.get("connection.id", ""),
            source=files[uuid],
            interface=found.get("connection.interface-name", ""),
            mac=found.get("802-3-ethernet.mac-address", "").lower(),
            addresses=_static(found.get("ipv4.method", ""), found.get("ipv4.addresses", "")),
            mtu=_mtu(found.get("802-3-ethernet.mtu", "")),
            active=uuid in on,
        )
        for found in blocks
        if (uuid := found.get("connection.uuid", "")) in files
        and found.get("connection.autoconnect") == "yes"
        and _lasts(files[uuid])
    )


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")  # nmcli(1): escapes are for tables, these are not one
    return name, value


def _lasts(source: str) -> bool:
    # What NetworkManager makes up for an interface without a profile lies in /run, like what netplan generates at each boot.
    return not source.startswith("/run/") or source.rpartition("/")[2].startswith("netplan-")


def _static(method: str, listed: str) -> tuple[IPv4Interface, ...]:
    if method != "manual":
        return ()
    read = (_interface(*text.strip().partition("/")[::2]) for text in listed.split(","))
    return tuple(address for address in read if isinstance(address, IPv4Interface))


def _mtu(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[1-9]\d{1,5}", text) else None


def networkd_profiles(links: Iterable[Mapping[str, Any]]) -> tuple[Profile, ...]:
    """networkd's links, as the probe takes them from `networkctl --json=short list`; only those that it configures."""
    return tuple(
        Profile(
            manager="networkd",
            name=_words(link, "NetworkFile").rpartition("/")[2],
            source=_words(link, "NetworkFile"),
            interface=_words(link, "Name"),
            mac="",
            addresses=_configured(link.get("addresses")),
            mtu=None,
            active=True,
        )
        for link in links
        if _words(link, "AdministrativeState") not in ("", "unmanaged")
    )


def _configured(rows: Any) -> tuple[IPv4Interface, ...]:
    found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    ours = (row for row in found if row.get("Family") == 2 and row.get("ConfigSource") == "static")  # 2: AF_INET
    read = (_interface(_dotted(row.get("Address")), row.get("PrefixLength")) for row in ours)
    return tuple(address for address in read if isinstance(address, IPv4Interface))


def _dotted(numbers: Any) -> str:
    return ".".join(map(str, numbers)) if isinstance(numbers, list) else ""


def socket_address(text: str) -> tuple[IPv4Address | IPv6Address, int] | None:
    """An address of /proc/net/tcp: `0100007F:1F90` is 127.0.0.1 port 8080 (words in the host's order: little-endian)."""
    found = re.fullmatch(r"([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4})", text)
    if not found:
        return None
    words = bytes.fromhex(found[1])
    packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    return (IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)), int(found[2], 16)
