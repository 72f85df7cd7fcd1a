"""The facts of a node: the probe's answer, read and typed.

A field is what was seen, None where it is not there, or an Unknown where the probe could not look: three different things.
Sizes are bytes, speeds of the network Mb/s where a name does not say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address
from typing import Final, TypeVar

from cluster.probe import without_secrets
from cluster.readings.box import DgxRelease, Gpu, GpuProcess, Memory, OsRelease, Unit
from cluster.readings.network import Address, Neighbour, Profile, Route
from cluster.readings.roce import Gid, IbPort, PciAddress, PcieLink

T = TypeVar("T")

NETWORKMANAGER: Final = "NetworkManager"
NETWORKD: Final = "networkd"


@dataclass(frozen=True)
class Unknown:
    """What could not be looked at, and why, in one line."""

    reason: str


@dataclass(frozen=True)
class Dmi:
    """What the firmware calls the box. OEMs' differ: a Spark is known by its GPU."""

    vendor: str | None
    product: str | None
    board: str | None
    bios: str | None


@dataclass(frozen=True)
class Disk:
    """The file system that a path lies, or would lie, on; `device` is the same for paths on the same one."""

    path: str
    device: int | Unknown
    total: int | Unknown
    free: int | Unknown


@dataclass(frozen=True)
class Nic:
    """A network interface. `carrier` and `speed` are None while it is down, when the kernel does not tell."""

    name: str
    up: bool
    carrier: bool | None
    operstate: str | None
    speed: int | None
    ethtool_speed: int | Unknown | None
    mtu: int | None
    mac: str | None
    driver: str | None
    pci: PciAddress | None
    addresses: tuple[Address, ...] | Unknown
    manager: str | Unknown | None
    profiles: tuple[Profile, ...] | Unknown

    @property
    def ipv4(self) -> tuple[IPv4Interface, ...]:
        """Its IPv4 addresses, none where they are unknown."""
        found = () if isinstance(self.addresses, Unknown) else self.addresses
        return tuple(address for address in found if isinstance(address, IPv4Interface))


@dataclass(frozen=True)
class RoceDevice:
    """A RoCE device (of a ConnectX-7 function) with its one port. `rate` in Gb/s: 40 without a link, whatever the cable."""

    name: str
    interface: str | None
    pci: PciAddress | None
    firmware: str | None
    kind: str | None
    state: str | None  # ACTIVE, DOWN
    physical: str | None  # LinkUp, Disabled, Polling
    rate: float | None
    link_layer: str | None
    gids: tuple[Gid, ...]


@dataclass(frozen=True)
class NetplanFile:
    """A file that netplan reads, without its secrets; Unknown where only root may read it, as is usual."""

    path: str
    text: str | Unknown


@dataclass(frozen=True)
class Listener:
    """Who listens on a TCP port; `pid` and `command` only of processes that are the user's own."""

    address: IPv4Address | IPv6Address
    port: int
    user: str
    pid: int | None
    command: str | None


@dataclass(frozen=True)
class User:
    """Whom the probe ran as."""

    uid: int
    name: str | None
    home: str


@dataclass(frozen=True)
class Limits:
    """Soft limits of what a login starts; -1 is none. RDMA needs much locked memory."""

    memlock: int
    nofile: int


@dataclass(frozen=True)
class Package:
    """A Python distribution; `version` is None where it is not installed."""

    name: str
    version: str | None


@dataclass(frozen=True)
class Packages:
    """What an interpreter of the node has of the distributions that ranks need."""

    python: str
    version: str
    all: tuple[Package, ...]

    def version_of(self, name: str) -> str | None:
        """The version of a distribution, None where it is not installed."""
        return next((package.version for package in self.all if package.name == name), None)


@dataclass(frozen=True)
class SparkctlHome:
    """$SPARKCTL_HOME on the node. `mode` is None before there is one; `unit` is the text of the agent's systemd unit."""

    path: str
    mode: int | None
    entries: tuple[str, ...]
    code: tuple[str, ...]
    jobs: tuple[str, ...]
    unit: str | None


@dataclass(frozen=True)
class Facts:
    """Everything that one probe saw of one node."""

    node: str  # its name in the inventory
    time: float  # seconds since 1970 by the node's clock, as the probe began
    duration: float  # seconds
    hostname: str | Unknown
    user: User | Unknown
    sudo: str | Unknown | None  # passwordless, password; None: there is no sudo
    linger: bool | Unknown
    user_manager: bool | Unknown  # whether the user's systemd manager runs
    machine_id: str | Unknown | None
    boot_id: str | Unknown | None
    dmi: Dmi | Unknown
    release: DgxRelease | Unknown | None
    os: OsRelease | Unknown | None
    kernel: str | Unknown | None
    cmdline: str | Unknown | None
    uptime: float | Unknown | None  # seconds
    clock_synchronized: bool | Unknown | None
    cores: int | Unknown
    machine: str | Unknown  # aarch64
    python: str | Unknown
    packages: Packages | Unknown | None
    nccl_library: str | Unknown | None  # the version of the system's own
    cuda: str | Unknown | None  # the toolkit's version
    gpus: tuple[Gpu, ...] | Unknown
    gpu_processes: tuple[GpuProcess, ...] | Unknown
    nvidia_module: str | Unknown | None  # the version of the loaded driver
    devices: tuple[str, ...] | Unknown  # nvidia0, infiniband/uverbs0, ... below /dev
    memory: Memory | Unknown
    swaps: tuple[str, ...] | Unknown
    disks: tuple[Disk, ...] | Unknown
    limits: Limits | Unknown
    units: tuple[Unit, ...] | Unknown
    earlyoom: str | Unknown | None  # its arguments
    ufw: bool | Unknown | None  # whether Ubuntu's firewall is on
    nft: str | Unknown | None  # the packet filter's rules, which only root may read
    dmesg: tuple[str, ...] | Unknown
    tools: tuple[str, ...] | Unknown  # those of probe.TOOLS that are installed
    nics: tuple[Nic, ...] | Unknown
    routes: tuple[Route, ...] | Unknown
    neighbours: tuple[Neighbour, ...] | Unknown
    hosts: str | Unknown | None  # the text of /etc/hosts
    managers: tuple[str, ...] | Unknown  # NetworkManager, networkd: those that run
    netplan: tuple[NetplanFile, ...] | Unknown  # in netplan's order
    roce: tuple[RoceDevice, ...] | Unknown
    ibdev2netdev: tuple[tuple[str, str, bool], ...] | Unknown  # device, interface, up
    ibstat: tuple[IbPort, ...] | Unknown
    pcie: tuple[PcieLink, ...] | Unknown  # of the ConnectX-7's functions
    listeners: tuple[Listener, ...] | Unknown  # on the ports that were asked about
    ssh_folder: int | Unknown | None  # the mode of ~/.ssh
    sparkctl: SparkctlHome | Unknown

    @property
    def is_spark(self) -> bool | Unknown:
        """Whether the box has a GB10, the one thing that every maker's DGX Spark shares."""
        return self.gpus if isinstance(self.gpus, Unknown) else any(gpu.is_gb10 for gpu in self.gpus)

    @property
    def has_cuda(self) -> bool:
        """Whether a rank here can use a GPU: nvidia-smi shows one, and its device file is there."""
        return not isinstance(self.gpus, Unknown) and bool(self.gpus) and self.has_device("nvidiactl")

    def has_device(self, name: str) -> bool:
        """Whether a device file of this name lies below /dev."""
        return not isinstance(self.devices, Unknown) and name in self.devices

    def has_tool(self, name: str) -> bool | Unknown:
        """Whether one of probe.TOOLS is installed."""
        return self.tools if isinstance(self.tools, Unknown) else name in self.tools

    def nic(self, name: str) -> Nic | None:
        """The interface of this name."""
        return next((nic for nic in known(self.nics, ()) if nic.name == name), None)

    def unit(self, name: str) -> Unit | None:
        """The systemd unit of this name (`earlyoom.service`), where the node has it."""
        return next((unit for unit in known(self.units, ()) if unit.name == name and unit.load == "loaded"), None)

    @property
    def nccl(self) -> str | None:
        """The version of NCCL that a rank loads: the one that torch brought, else the system's; None where neither is known."""
        packages = known(self.packages, None)
        brought = [packages.version_of(f"nvidia-nccl-cu{cuda}") for cuda in (13, 12)] if packages else []
        return next((version for version in brought if version), None) or known(self.nccl_library, None)


def known(fact: T | Unknown, otherwise: T) -> T:
    """What was seen; `otherwise` where it is unknown, for readers to whom that is the same."""
    return otherwise if isinstance(fact, Unknown) else fact


def parse(raw: bytes, node: str) -> Facts:
    """Read the output of the probe on `node`.

    Raises:
        FailedError: the output is no probe's answer: too large, garbage, cut short, of another shape.
    """
    from cluster.readings import node as reading

    return reading.facts_of(raw, node)


def with_netplan(facts: Facts, texts: Mapping[str, str]) -> Facts:
    """The facts with the texts of netplan files that were read otherwise, with sudo. Their secrets are left out."""
    files = tuple(
        replace(file, text=without_secrets(texts[file.path])) if file.path in texts else file
        for file in known(facts.netplan, ())
    )
    return replace(facts, netplan=files)


def clock_skew(facts: Facts, *, asked: float, answered: float) -> tuple[float, float]:
    """How far the node's clock is ahead of ours, and the uncertainty of that, in seconds.

    Args:
        asked: our clock as the probe was sent.
        answered: our clock as its answer was complete.
    """
    early, late = facts.time - max(asked, answered - facts.duration), facts.time - asked
    return (early + late) / 2, abs(late - early) / 2
