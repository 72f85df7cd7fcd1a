"""A node's whole answer: each fact read and put in its place in Facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from cluster.facts import (
    NETWORKD,
    NETWORKMANAGER,
    Disk,
    Dmi,
    Facts,
    Limits,
    Listener,
    NetplanFile,
    Nic,
    Package,
    Packages,
    RoceDevice,
    SparkctlHome,
    Unknown,
    User,
)
from cluster.readings import answer, box, network, roce
from cluster.readings.network import Profile
from cluster.readings.roce import Gid, PcieLink

T = TypeVar("T")
R = TypeVar("R")


def _seen(fact: answer.Value[T], read: Callable[[T], R | Unknown | None]) -> R | Unknown | None:
    if fact.unknown is not None:
        return Unknown(fact.unknown)
    return None if fact.value is None else read(fact.value)


def _there(fact: answer.Value[T], read: Callable[[T], R | Unknown | None]) -> R | Unknown:
    """As _seen, of a fact that every node has."""
    found = _seen(fact, read)
    return Unknown("the probe says nothing of it") if found is None else found


def _same(value: T) -> T:
    return value


def facts_of(raw: bytes, node: str) -> Facts:
    """The probe's output as Facts: see cluster.facts.parse.

    Raises:
        FailedError: it is no answer of the probe.
    """
    given = answer.read(raw, node)
    facts = given.facts
    return Facts(
        node=node,
        time=given.time,
        duration=given.duration,
        hostname=_there(facts.hostname, _same),
        user=_there(facts.user, lambda user: User(user.uid, user.name, user.home)),
        sudo=_seen(facts.sudo, _same),
        linger=_there(facts.linger, _same),
        user_manager=_there(facts.user_manager, _same),
        machine_id=_seen(facts.machine_id, _same),
        boot_id=_seen(facts.boot_id, _same),
        dmi=_there(facts.dmi, _dmi),
        release=_seen(facts.dgx_release, box.dgx_release),
        os=_seen(facts.os_release, box.os_release),
        kernel=_seen(facts.kernel, _same),
        cmdline=_seen(facts.cmdline, _same),
        uptime=_seen(facts.uptime, box.number),
        clock_synchronized=_seen(facts.timedatectl, box.clock_synchronized),
        cores=_there(facts.cpu, lambda cpu: cpu.cores),
        machine=_there(facts.cpu, lambda cpu: cpu.machine),
        python=_there(facts.python, _same),
        packages=_seen(facts.packages, _packages),
        nccl_library=_seen(facts.nccl_libraries, lambda names: box.nccl_library(tuple(names))),
        cuda=_seen(facts.cuda, lambda cuda: box.cuda_version(cuda.files, cuda.nvcc)),
        gpus=_there(facts.gpu, box.gpus),
        gpu_processes=_there(facts.gpu_processes, box.gpu_processes),
        nvidia_module=_seen(facts.nvidia_module, _same),
        devices=_there(facts.devices, tuple),
        memory=_there(facts.meminfo, lambda text: box.memory(text) or Unknown("/proc/meminfo lacks MemAvailable")),
        swaps=_there(
            facts.swaps, lambda text: tuple(line.split()[0] for line in text.splitlines()[1:] if line.strip())
        ),
        disks=_there(facts.disks, _disks),
        limits=_there(facts.limits, _limits),
        units=_there(facts.units, box.units),
        earlyoom=_seen(facts.earlyoom, lambda text: box.assignments(text).get("EARLYOOM_ARGS", "")),
        ufw=_seen(facts.ufw, box.ufw_enabled),
        nft=_seen(facts.nft, _same),
        dmesg=_there(facts.dmesg, lambda text: tuple(text.splitlines())),
        tools=_there(facts.tools, lambda tools: tuple(name for name, path in tools.items() if path)),
        nics=_nics(facts),
        routes=_there(facts.routes, lambda text: _or_unknown(network.routes(text), "`ip -j route` prints no JSON")),
        neighbours=_there(facts.neighbours, network.neighbours),
        hosts=_seen(facts.hosts, _same),
        managers=_managers(facts),
        netplan=_there(facts.netplan, _netplan),
        roce=_there(facts.roce, lambda found: tuple(_roce(name, found[name]) for name in sorted(found))),
        ibdev2netdev=_there(facts.ibdev2netdev, _ibdev2netdev),
        ibstat=_there(facts.ibstat, roce.ibstat),
        pcie=_pcie(facts),
        listeners=_there(facts.listeners, _listeners),
        ssh_folder=_seen(facts.ssh_folder, _same),
        sparkctl=_there(facts.sparkctl, _sparkctl),
    )


def _or_unknown(found: T | None, reason: str) -> T | Unknown:
    return Unknown(reason) if found is None else found


def _dmi(found: Mapping[str, str | None]) -> Dmi:
    return Dmi(found.get("sys_vendor"), found.get("product_name"), found.get("board_name"), found.get("bios_version"))


def _packages(found: answer.Packages) -> Packages:
    names = sorted(found.distributions)
    return Packages(found.python, found.version, tuple(Package(name, found.distributions[name]) for name in names))


def _disks(found: Mapping[str, answer.Value[answer.Disk]]) -> tuple[Disk, ...]:
    return tuple(
        Disk(
            path,
            _there(disk, lambda seen: seen.device),
            _there(disk, lambda seen: seen.total),
            _there(disk, lambda seen: seen.free),
        )
        for path, disk in found.items()
    )


def _limits(found: Mapping[str, tuple[int, int]]) -> Limits | Unknown:
    if "memlock" not in found or "nofile" not in found:
        return Unknown("the probe says nothing of them")
    return Limits(found["memlock"][0], found["nofile"][0])


def _managers(facts: answer.Answers) -> tuple[str, ...] | Unknown:
    asked = ((NETWORKMANAGER, facts.networkmanager), (NETWORKD, facts.networkd))
    unknown = next((fact.unknown for _, fact in asked if fact.unknown is not None), None)
    return Unknown(unknown) if unknown else tuple(name for name, fact in asked if fact.value is not None)


def _nics(facts: answer.Answers) -> tuple[Nic, ...] | Unknown:
    addresses = _there(
        facts.addresses, lambda text: _or_unknown(network.addresses(text), "`ip -j addr` prints no JSON")
    )
    profiles = _profiles(facts)
    managers = _managers_by_interface(facts)
    speeds = facts.ethtool.value or {}

    def nic(name: str, found: answer.Nic) -> Nic:
        mac = (found.address or "").lower()
        flags = int(found.flags or "0", 16) if (found.flags or "").startswith("0x") else 0
        speed = box.whole(found.speed)
        return Nic(
            name=name,
            up=bool(flags & 1),  # IFF_UP of linux/if.h
            carrier={"1": True, "0": False}.get(found.carrier or ""),
            operstate=found.operstate,
            speed=speed if speed and speed > 0 else None,
            ethtool_speed=_seen(speeds[name], network.ethtool_speed) if name in speeds else None,
            mtu=box.whole(found.mtu),
            mac=mac or None,
            driver=found.driver,
            pci=roce.pci_address(found.pci),
            addresses=addresses if isinstance(addresses, Unknown) else addresses.get(name, ()),
            manager=managers if isinstance(managers, Unknown) else managers.get(name),
            profiles=profiles
            if isinstance(profiles, Unknown)
            else tuple(
                one for one in profiles if one.interface == name or (not one.interface and one.mac == mac != "")
            ),
        )

    return _there(facts.nics, lambda found: tuple(nic(name, found[name]) for name in sorted(found)))


def _profiles(facts: answer.Answers) -> tuple[Profile, ...] | Unknown:
    for fact in (facts.networkmanager, facts.networkd):
        if fact.unknown is not None:
            return Unknown(fact.unknown)
    ours: tuple[Profile, ...] = ()
    if facts.networkmanager.value is not None:
        said = facts.networkmanager.value
        active = [uuid for _, uuid in network.nmcli_devices(said.devices).values()]
        ours = network.nmcli_profiles(said.connections, said.profiles, active)
    links = [link.model_dump() for link in facts.networkd.value or ()]
    return ours + network.networkd_profiles(links)


def _managers_by_interface(facts: answer.Answers) -> dict[str, str] | Unknown:
    managers = _managers(facts)
    if isinstance(managers, Unknown):
        return managers
    links = facts.networkd.value or ()
    configured = {link.Name: NETWORKD for link in links if link.AdministrativeState not in (None, "", "unmanaged")}
    said = facts.networkmanager.value
    devices = network.nmcli_devices(said.devices) if said else {}
    idle = ("unmanaged", "connected (externally)")
    return configured | {name: NETWORKMANAGER for name, (state, _) in devices.items() if state not in idle}


def _netplan(found: list[answer.NetplanFile]) -> tuple[NetplanFile, ...]:
    return tuple(NetplanFile(file.path, _there(file.text, _same)) for file in found)


def _roce(name: str, found: answer.RoceDevice) -> RoceDevice:
    port = found.ports.get("1")
    # A function with virtual ones shows several interfaces; its GID table then names the one that is its own.
    named = found.interfaces if len(found.interfaces) == 1 else [gid.interface for gid in (port.gids if port else [])]
    return RoceDevice(
        name=name,
        interface=named[0] if named else None,
        pci=roce.pci_slot(found.uevent),
        firmware=found.fw_ver,
        kind=found.hca_type,
        state=roce.state(port.state) if port else None,
        physical=roce.state(port.phys_state) if port else None,
        rate=roce.rate(port.rate) if port else None,
        link_layer=port.link_layer if port else None,
        gids=tuple(gid for gid in map(_gid, port.gids) if gid) if port else (),
    )


def _gid(row: answer.Gid) -> Gid | None:
    address = roce.gid_address(row.gid)
    return Gid(row.index, address, row.type or "", row.interface) if address else None


def _ibdev2netdev(text: str) -> tuple[tuple[str, str, bool], ...]:
    return tuple((device, *rest) for device, rest in sorted(roce.ibdev2netdev(text).items()))


def _pcie(facts: answer.Answers) -> tuple[PcieLink, ...] | Unknown:
    """lspci's word where it gives one (to root, that is), else that of /sys."""
    shown = facts.lspci.value
    from_lspci = {link.address: link for link in roce.lspci(shown)} if shown else {}
    from_sysfs = {}
    for address, found in (facts.pcie.value or {}).items():
        speeds = (found.current_link_speed, found.current_link_width, found.max_link_speed, found.max_link_width)
        link = roce.sysfs_link(address, *speeds)
        if link:
            from_sysfs[link.address] = link
    links = from_sysfs | from_lspci
    if not links and (reason := facts.pcie.unknown or facts.lspci.unknown):
        return Unknown(reason)
    return tuple(links[address] for address in sorted(links, key=str))


def _listeners(found: list[answer.Listener]) -> tuple[Listener, ...]:
    read = ((network.socket_address(row.address), row) for row in found)
    return tuple(Listener(*place, row.user, row.pid, row.command) for place, row in read if place)


def _sparkctl(found: answer.Sparkctl) -> SparkctlHome:
    return SparkctlHome(found.path, found.mode, tuple(found.entries), tuple(found.code), tuple(found.jobs), found.unit)
