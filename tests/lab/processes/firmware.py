"""Pure: the /sys and /proc files that a Spark's hardware would show, from the facts and the state of the interfaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from .facts import PCI, ROCE, Facts

GIDS = 8
"""Rows of the GID table that we show; a ConnectX-7 shows 255, all but a few of them zero."""


@dataclass(frozen=True)
class Interface:
    """One network interface as the host's kernel knows it."""

    name: str
    carrier: bool
    mac: str
    addresses: tuple[str, ...]  # without prefix length, IPv6 first as they come


def speeds(facts: Facts, interfaces: Mapping[str, Interface]) -> dict[str, str]:
    """``/sys/class/net/NAME/speed`` of each ConnectX-7 interface: Mb/s, -1 without carrier."""
    return {name: f"{facts.speed(name) if interfaces[name].carrier else -1}\n" for name in ROCE if name in interfaces}


def infiniband(facts: Facts, interfaces: Mapping[str, Interface]) -> dict[str, str]:
    """``/sys/class/infiniband`` as path: text."""
    tree: dict[str, str] = {}
    for name, device in ROCE.items():
        if name in interfaces:
            tree |= {f"{device}/{path}": f"{text}\n" for path, text in _device(facts, interfaces[name]).items()}
    return tree


def _device(facts: Facts, interface: Interface) -> dict[str, str]:
    up = interface.carrier
    rate = f"{facts.speed(interface.name) // 1000} Gb/sec (4X HDR)" if up else "40 Gb/sec (4X QDR)"
    guid = "".join(interface.mac.split(":")[:3]) + "fffe" + "".join(interface.mac.split(":")[3:])
    tree = {
        "fw_ver": facts.firmware,
        "hca_type": "MT4129",
        "board_id": "NVD0000000087",
        "node_guid": _grouped(guid),
        "node_type": "1: CA",
        f"device/net/{interface.name}/operstate": "up" if up else "down",
        "device/vendor": "0x15b3",
        "device/uevent": f"DRIVER=mlx5_core\nPCI_SLOT_NAME={PCI[interface.name]}",
        "ports/1/state": "4: ACTIVE" if up else "1: DOWN",
        "ports/1/phys_state": "5: LinkUp" if up else "3: Disabled",
        "ports/1/rate": rate,
        "ports/1/link_layer": "Ethernet",
    }
    for number in range(GIDS):
        tree[f"ports/1/gids/{number}"] = _grouped("0" * 32)
    for number, (gid, kind) in enumerate(_gids(interface)):
        tree[f"ports/1/gids/{number}"] = _grouped(gid)
        tree[f"ports/1/gid_attrs/types/{number}"] = kind
        tree[f"ports/1/gid_attrs/ndevs/{number}"] = interface.name
    return tree


def _gids(interface: Interface) -> list[tuple[str, str]]:
    """Each address appears twice, once for each version of RoCE; IPv4 ones as ``::ffff:ADDRESS``."""
    gids = []
    for text in interface.addresses:
        mapped = text if ":" in text else f"::ffff:{IPv4Address(text)}"
        packed = IPv6Address(mapped).packed.hex()
        gids += [(packed, "IB/RoCE v1"), (packed, "RoCE v2")]
    return gids[:GIDS]


def _grouped(digits: str) -> str:
    return ":".join(digits[at : at + 4] for at in range(0, len(digits), 4))


def dmi(facts: Facts) -> dict[str, str]:
    """``/sys/class/dmi/id``."""
    return {
        "sys_vendor": f"{facts.vendor}\n",
        "product_name": f"{facts.product}\n",
        "board_vendor": f"{facts.vendor}\n",
        "board_name": f"{facts.board}\n",
        "bios_version": f"{facts.bios_version}\n",
    }


def meminfo(real: str, facts: Facts, limit: int | None, usage: int, cache: int) -> str:
    """``/proc/meminfo``: this machine's, narrowed to a control group's limit, then with the facts' own lines.

    ``usage`` and ``cache`` (page cache that can be dropped) are the control group's, in bytes. A real line that a limit
    makes meaningless is left out.
    """
    lines = dict(line.split(":", 1) for line in real.splitlines())
    values = {name: int(value.split()[0]) for name, value in lines.items()}
    if limit is not None:
        free = max(limit - usage, 0)
        values = {
            "MemTotal": limit // 1024,
            "MemFree": free // 1024,
            "MemAvailable": min(free + cache, limit) // 1024,
            "Buffers": 0,
            "Cached": cache // 1024,
            "SwapTotal": 0,
            "SwapFree": 0,
            "HugePages_Total": 0,
            "HugePages_Free": 0,
            "Hugepagesize": 2048,
        }
    values |= facts.meminfo
    return "".join(
        f"{name + ':':<16}{value:>10}{'' if name.startswith('HugePages_') else ' kB'}\n"
        for name, value in values.items()
    )
