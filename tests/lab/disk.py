"""A host's disk: this machine's operating system, without what its owner put there, made into a fresh DGX OS.

The disk is the upper layer of an overlay over this machine's own root. ``render`` says what is written there; ``write``
writes it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .processes.facts import PORTS, Facts
from .processes.room import MANAGEMENT

HERE = Path(__file__).parent
USER, UID = "spark", 1000

SYSTEM = ("bin", "boot", "etc", "lib", "lib32", "lib64", "libx32", "sbin", "usr", "var")
"""What a host sees of this machine's root; everything else is hidden from it."""

EMPTY = ("dev", "home", "media", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp")
EMPTIED = (
    "etc/NetworkManager/system-connections",
    "etc/avahi/services",
    "etc/cron.d",
    "etc/netplan",
    "etc/network",
    "etc/ssh",
    "etc/sudoers.d",
    "etc/sysctl.d",
    "etc/systemd/network",
    "etc/systemd/system",
    "usr/local",
    "var/lib/NetworkManager",
    "var/lib/systemd",
    "var/log",
)
"""Folders in which a host sees nothing of this machine's."""

TOOLS = {
    "nvidia-smi": "usr/bin",
    "nvcc": "usr/local/cuda-13.0/bin",
    "ibdev2netdev": "usr/sbin",
    "ibstat": "usr/sbin",
    "ethtool": "usr/sbin",
    "lspci": "usr/bin",
    "dmesg": "usr/bin",
    "udevadm": "usr/bin",
}
"""Where the commands of bin/ stand in for the real ones; ib_write_bw comes with the fact of that name."""

WRAPPED = ("/usr/sbin/ethtool", "/usr/bin/udevadm")
"""Real programs that our stand-ins call, kept in /usr/lib/sparklab."""

MASKED = (
    "NetworkManager-wait-online.service",
    "console-getty.service",
    "dev-hugepages.mount",
    "getty.target",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "modprobe@.service",
    "packagekit-offline-update.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-initctl.socket",
    "systemd-journald-audit.socket",
    "systemd-machine-id-commit.service",
    "systemd-modules-load.service",
    "systemd-networkd-wait-online.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pcrphase.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-repart.service",
    "systemd-resolved.service",
    "systemd-sysctl.service",
    "systemd-sysusers.service",
    "systemd-timesyncd.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
)
"""Units that a host without devices, or without a network beyond the lab, does better without."""

SSHD = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PasswordAuthentication yes
KbdInteractiveAuthentication no
UsePAM yes
UseDNS no
PrintMotd no
AcceptEnv LANG LC_*
Subsystem sftp /usr/lib/openssh/sftp-server
"""

AVAHI_SSH = """\
<?xml version="1.0" standalone='no'?>
<!DOCTYPE service-group SYSTEM "avahi-service.dtd">
<service-group><name replace-wildcards="yes">%h</name><service><type>_ssh._tcp</type><port>22</port></service></service-group>
"""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Identity:
    """What tells one host's disk from another's. ``address`` and ``gateway`` are on the management network."""

    name: str
    address: str
    gateway: str
    home: str
    init: str  # simple or systemd
    network: str  # networkmanager or networkd
    authorized_key: str
    host_key: Path  # the private one; the public one lies beside it


@dataclass(frozen=True)
class Entry:
    """A file, a symbolic link, or (with neither) a folder, at ``path`` relative to the disk's root."""

    path: str
    data: str | bytes | None = None
    link: str | None = None
    mode: int | None = None  # None: 0755 for a folder, 0644 for a file
    owner: int = 0


def render(host: Identity, facts: Facts) -> Iterator[Entry]:
    """Everything that a new host's disk has over this machine's root."""
    yield from _accounts(host)
    yield from _ssh(host)
    yield from _names(host)
    yield from _tools(facts)
    if host.init == "systemd":
        yield from _units(host.network)
        yield from _networkmanager(host) if host.network == "networkmanager" else _networkd(host)
    else:
        yield Entry("usr/lib/sparklab/init.py", (HERE / "processes" / "init.py").read_bytes())
        yield Entry("usr/lib/sparklab/network", "\n".join(_ip_commands(host)) + "\n")


def _accounts(host: Identity) -> Iterator[Entry]:
    for name, line in (
        ("passwd", f"{USER}:x:{UID}:{UID}:{USER}:{host.home}:/bin/bash"),
        ("group", f"{USER}:x:{UID}:"),
        ("shadow", f"{USER}:*:20000:0:99999:7:::"),
    ):
        lines = Path("/etc", name).read_text().splitlines()
        kept = [old for old in lines if not old.startswith(f"{USER}:") and old.split(":")[2] != str(UID)]
        if name == "group":
            kept = [_joined(old) if old.split(":")[0] in ("adm", "sudo", "systemd-journal") else old for old in kept]
        yield Entry(f"etc/{name}", "\n".join([*kept, line]) + "\n", mode=0o640 if name == "shadow" else 0o644)
    yield Entry(
        "etc/sudoers",
        f'Defaults env_reset\nDefaults secure_path="{PATH}"\nroot ALL=(ALL:ALL) ALL\n@includedir /etc/sudoers.d\n',
        mode=0o440,
    )
    yield Entry(f"etc/sudoers.d/{USER}", sudo_rule(password=False), mode=0o440)
    yield Entry("etc/environment", f'PATH="{PATH}"\n')
    yield Entry("root", mode=0o755)  # a bound virtual environment's interpreter may lie below
    home = host.home.lstrip("/")
    yield Entry(home, mode=0o750, owner=UID)
    for name in (".bashrc", ".profile"):
        yield Entry(f"{home}/{name}", Path("/etc/skel", name).read_bytes(), owner=UID)


def _joined(group: str) -> str:
    return f"{group}{'' if group.endswith(':') else ','}{USER}"


def sudo_rule(*, password: bool) -> str:
    """/etc/sudoers.d/spark."""
    return f"{USER} ALL=(ALL:ALL) {'' if password else 'NOPASSWD:'}ALL\n"


def _ssh(host: Identity) -> Iterator[Entry]:
    ssh = f"{host.home.lstrip('/')}/.ssh"
    yield Entry(ssh, mode=0o700, owner=UID)
    yield Entry(f"{ssh}/authorized_keys", f"{host.authorized_key}\n", mode=0o600, owner=UID)
    yield Entry("etc/ssh/sshd_config", SSHD)
    yield Entry("etc/ssh/ssh_host_ed25519_key", host.host_key.read_bytes(), mode=0o600)
    yield Entry("etc/ssh/ssh_host_ed25519_key.pub", host.host_key.with_suffix(".pub").read_bytes())
    yield Entry("etc/avahi/services/ssh.service", AVAHI_SSH)


def _names(host: Identity) -> Iterator[Entry]:
    yield Entry("etc/hostname", f"{host.name}\n")
    yield Entry("etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n::1 localhost ip6-localhost ip6-loopback\n")
    yield Entry("etc/resolv.conf", "# no resolver: 127.0.0.1 refuses at once\n")
    yield Entry("etc/machine-id", hashlib.md5(f"{host.name} {host.host_key}".encode()).hexdigest() + "\n")  # noqa: S324
    yield Entry("etc/fstab", "")
    yield Entry("etc/sysctl.conf", "")


def _tools(facts: Facts) -> Iterator[Entry]:
    for name, folder in TOOLS.items():
        yield Entry(f"{folder}/{name}", (HERE / "bin" / name).read_bytes(), mode=0o755)
    for program in map(Path, WRAPPED):
        yield Entry(f"usr/lib/sparklab/{program.name}", program.read_bytes(), mode=0o755)
    yield Entry("usr/lib/sparklab/facts.py", (HERE / "processes" / "facts.py").read_bytes())
    for path, text in facts.files().items():
        if text is not None:
            yield Entry(path.lstrip("/"), text)
    yield Entry("usr/local/cuda", link="cuda-13.0")
    yield Entry("etc/sparklab")


def _units(network: str) -> Iterator[Entry]:
    """Only what a host needs starts; generators of what else this machine has installed are hidden (see ``write``)."""
    units = "etc/systemd/system"
    lib = "/lib/systemd/system"
    manager = {"networkmanager": "NetworkManager.service", "networkd": "systemd-networkd.service"}[network]
    yield Entry(f"{units}/default.target", link=f"{lib}/multi-user.target")
    for unit in ("ssh.service", "avahi-daemon.service", manager):
        yield Entry(f"{units}/multi-user.target.wants/{unit}", link=f"{lib}/{unit}")
    yield Entry(f"{units}/dbus-org.freedesktop.Avahi.service", link=f"{lib}/avahi-daemon.service")
    if network == "networkd":
        yield Entry(f"{units}/dbus-org.freedesktop.network1.service", link=f"{lib}/systemd-networkd.service")
    else:
        yield Entry(
            f"{units}/dbus-org.freedesktop.nm-dispatcher.service", link=f"{lib}/NetworkManager-dispatcher.service"
        )
    for unit in MASKED:
        yield Entry(f"{units}/{unit}", link="/dev/null")


def _networkmanager(host: Identity) -> Iterator[Entry]:
    """DGX OS: NetworkManager has everything, and the ConnectX-7 ports are left to the profiles that it makes by itself."""
    yield Entry(
        "etc/netplan/01-network-manager-all.yaml",
        "# Let NetworkManager manage all devices on this system\nnetwork:\n  version: 2\n  renderer: NetworkManager\n",
        mode=0o600,
    )
    profile = f"""\
[connection]
id={MANAGEMENT}
uuid={uuid.uuid5(uuid.NAMESPACE_DNS, host.name)}
type=ethernet
interface-name={MANAGEMENT}

[ipv4]
method=manual
address1={host.address}/24,{host.gateway}

[ipv6]
method=link-local
"""
    yield Entry(f"etc/NetworkManager/system-connections/{MANAGEMENT}.nmconnection", profile, mode=0o600)


def _networkd(host: Identity) -> Iterator[Entry]:
    """Ubuntu Server: netplan's installer file has the management network; the ConnectX-7 ports are only brought up."""
    yield Entry(
        "etc/netplan/00-installer-config.yaml",
        f"network:\n  version: 2\n  renderer: networkd\n  ethernets:\n    {MANAGEMENT}:\n      addresses: [{host.address}/24]\n"
        f"      routes:\n        - {{to: default, via: {host.gateway}}}\n",
        mode=0o600,
    )
    ports = " ".join(interface for port in PORTS for interface in port)
    yield Entry(
        "etc/systemd/network/90-connectx.network",
        f"[Match]\nName={ports}\n\n[Link]\nRequiredForOnline=no\n\n[Network]\nLinkLocalAddressing=ipv6\nIPv6AcceptRA=no\n",
    )


def _ip_commands(host: Identity) -> list[str]:
    """What the simple init does for a network, as lines of ``ip -batch``."""
    ports = [f"link set {interface} up" for port in PORTS for interface in port]
    management = [f"addr add {host.address}/24 dev {MANAGEMENT}", f"link set {MANAGEMENT} up"]
    return ["link set lo up", *management, f"route add default via {host.gateway}", *ports]


def write(entries: Iterator[Entry], upper: Path, lower: Path = Path("/")) -> None:
    """Make an overlay's upper layer, above ``lower``, of the entries."""
    upper.chmod(0o755)
    for name in EMPTY + EMPTIED:
        _folder(upper, upper / name)
        os.setxattr(upper / name, "trusted.overlay.opaque", b"y")
    for name in ("usr/local/bin", "usr/local/sbin", "usr/local/lib", "usr/local/share"):
        _folder(upper, upper / name)
    for name in ("tmp", "var/tmp"):
        _folder(upper, upper / name)
        (upper / name).chmod(0o1777)
    hidden = [path for path in lower.iterdir() if path.name not in SYSTEM + EMPTY]
    hidden += [path for path in (lower / "lib/systemd/system-generators").iterdir() if path.name != "netplan"]
    for path in hidden:
        whiteout = upper / path.resolve().relative_to(lower.resolve())
        _folder(upper, whiteout.parent)
        os.mknod(whiteout, 0o600 | 0o020000, os.makedev(0, 0))
    for entry in entries:
        _write(upper, entry)


def _folder(upper: Path, folder: Path) -> None:
    """Make a folder and those above it, each with the rights and owner that it has on this machine."""
    for path in reversed([folder, *folder.parents]):
        if path.is_relative_to(upper) and not path.exists():
            path.mkdir()
            below = Path("/") / path.relative_to(upper)
            if below.exists():
                shutil.copystat(below, path)
                os.chown(path, below.stat().st_uid, below.stat().st_gid)
            else:
                path.chmod(0o755)


def _write(upper: Path, entry: Entry) -> None:
    path = upper / entry.path
    _folder(upper, path.parent)
    if entry.link is not None:
        path.symlink_to(entry.link)
        return
    if entry.data is None:
        _folder(upper, path)
        path.chmod(entry.mode or 0o755)
    else:
        path.write_bytes(entry.data.encode() if isinstance(entry.data, str) else entry.data)
        path.chmod(entry.mode or 0o644)
    os.chown(path, entry.owner, entry.owner)
