"""The ConnectX-7 as its tools and /sys show it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address


@dataclass(frozen=True)
class Gid:
    """A row of a RoCE device's GID table: an address, once for each version of RoCE."""

    index: int
    address: IPv6Address
    kind: str  # "RoCE v2" or "IB/RoCE v1"
    interface: str | None

    @property
    def ipv4(self) -> IPv4Address | None:
        """The IPv4 address that it stands for."""
        return self.address.ipv4_mapped


def gid_address(text: str) -> IPv6Address | None:
    """A GID as /sys writes it, `0000:0000:0000:0000:0000:ffff:c0a8:640a`."""
    try:
        return IPv6Address(text)
    except ValueError:
        return None


def state(text: str | None) -> str | None:
    """A port's `state` (`4: ACTIVE`) or `phys_state` (`5: LinkUp`) without its number."""
    found = re.fullmatch(r"\d+: (\w+)", text or "")
    return found[1] if found else None


def rate(text: str | None) -> float | None:
    """A port's `rate` (`200 Gb/sec (4X HDR)`, `2.5 Gb/sec`) in Gb/s."""
    found = re.match(r"(\d{1,5}(?:\.\d{1,3})?) Gb/sec", text or "")
    return float(found[1]) if found else None


@dataclass(frozen=True)
class PciAddress:
    """`0002:01:00.1`: on a Spark the domain tells which PCIe link it is, and the function which QSFP socket."""

    domain: int
    bus: int
    device: int
    function: int

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"


def pci_address(text: str | None) -> PciAddress | None:
    """Read a PCI address, with or without its domain."""
    found = re.fullmatch(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", (text or "").lower())
    return PciAddress(int(found[1] or "0", 16), int(found[2], 16), int(found[3], 16), int(found[4])) if found else None


def pci_slot(uevent: str | None) -> PciAddress | None:
    """The PCI address in a device's `uevent` file."""
    found = re.search(r"^PCI_SLOT_NAME=(\S+)$", uevent or "", re.MULTILINE)
    return pci_address(found[1]) if found else None


def ibdev2netdev(text: str) -> dict[str, tuple[str, bool]]:
    """Read `ibdev2netdev`: each RoCE device's interface, and whether that is Up. The order of lines varies."""
    found = re.findall(r"^(\S+) port \d+ ==> (\S+) \((Up|Down)\)\s*$", text, re.MULTILINE)
    return {device: (interface, up == "Up") for device, interface, up in found}


@dataclass(frozen=True)
class IbPort:
    """A device's first port as `ibstat` shows it; `rate` in Gb/s."""

    device: str
    kind: str | None  # MT4129 is a ConnectX-7
    firmware: str | None
    state: str | None  # Active, Down
    physical: str | None  # LinkUp, Disabled
    rate: float | None


def ibstat(text: str) -> tuple[IbPort, ...]:
    """Read `ibstat`: a block for each device."""
    parts = re.split(r"^CA '([^'\n]+)'\s*$", text, flags=re.MULTILINE)[1:]
    blocks = zip(parts[::2], parts[1::2], strict=True)
    return tuple(
        _ib_port(device, dict(re.findall(r"^\s*([\w ]+): (.+?)\s*$", block, re.MULTILINE))) for device, block in blocks
    )


def _ib_port(device: str, lines: dict[str, str]) -> IbPort:
    speed = lines.get("Rate", "")
    return IbPort(
        device=device,
        kind=lines.get("CA type"),
        firmware=lines.get("Firmware version"),
        state=lines.get("State"),
        physical=lines.get("Physical state"),
        rate=float(speed) if re.fullmatch(r"\d{1,5}(\.\d{1,3})?", speed) else None,
    )


@dataclass(frozen=True)
class PcieLink:
    """What a PCIe function's link has trained to; `speed` in GT/s, `width` in lanes. A Spark's ConnectX-7: 32 GT/s, x4."""

    address: PciAddress
    speed: float
    width: int
    max_speed: float | None = None
    max_width: int | None = None

    @property
    def is_downgraded(self) -> bool:
        """Whether it runs slower or narrower than both its ends could."""
        return self.speed < (self.max_speed or 0) or self.width < (self.max_width or 0)


_LINK = r"Speed (\d{1,3}(?:\.\d{1,2})?)GT/s(?: \(\w+\))?, Width x(\d{1,2})"


def lspci(text: str) -> tuple[PcieLink, ...]:
    """Read `lspci -D -vv`: functions whose LnkSta it shows, which it does to root only."""
    parts = re.split(r"^((?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) ", text, flags=re.MULTILINE)[1:]
    read = (_lspci_link(pci_address(slot), block) for slot, block in zip(parts[::2], parts[1::2], strict=True))
    return tuple(link for link in read if link is not None)


def _lspci_link(address: PciAddress | None, block: str) -> PcieLink | None:
    status = re.search(rf"LnkSta:\s*{_LINK}", block)
    if address is None or status is None:
        return None
    most = re.search(rf"LnkCap:.*?{_LINK}", block)
    return PcieLink(
        address,
        float(status[1]),
        int(status[2]),
        max_speed=float(most[1]) if most else None,
        max_width=int(most[2]) if most else None,
    )


def sysfs_link(
    address: str, speed: str | None, width: str | None, max_speed: str | None, max_width: str | None
) -> PcieLink | None:
    """A PCIe link from /sys/bus/pci/devices: `32.0 GT/s PCIe`, `4`; None for a link that is down (`Unknown`, `0`)."""
    place, speeds, widths = (
        pci_address(address),
        [_gigatransfers(text) for text in (speed, max_speed)],
        (width, max_width),
    )
    lanes = [int(text) if re.fullmatch(r"\d{1,3}", text or "") and text else 0 for text in widths]
    if place is None or not speeds[0] or not 0 < lanes[0] < 64:
        return None
    return PcieLink(place, speeds[0], lanes[0], speeds[1], lanes[1] if 0 < lanes[1] < 64 else None)


def _gigatransfers(text: str | None) -> float | None:
    found = re.match(r"(\d{1,3}(?:\.\d)?) GT/s", text or "")
    return float(found[1]) if found else None
