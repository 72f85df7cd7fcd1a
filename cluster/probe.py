"""The facts of a node, as one line of JSON on stdout.

Piped to `python3 -IS -` on the node (see `script`): one file, standard library only, any Python from 3.8, no root. It looks
and changes nothing, sends texts as the node's tools print them (cluster.facts reads them), and never fails as a whole:
each fact is looked up by itself, and one that could not be looked at says why, which is not the same as not being there.

    {"sparkctl_probe": 1, "time": 1790000000.0, "duration": 0.21,
     "facts": {"meminfo": {"value": "MemTotal: ..."}, "dgx_release": {"value": null}, "nft": {"unknown": "..."}, ...}}
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import platform
import pwd
import re
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ARGV = ("python3", "-IS", "-")  # isolated: nothing in the folder it starts in, or in PYTHONPATH, passes for a module
VERSION = 1

COMMAND_SECONDS = 4.0  # for one command: nvidia-smi on a wedged driver never returns
ALL_SECONDS = 8.0  # for everything: a dead NFS server behind $HOME may hold one look-up for ever
MOST_TEXT = 1 << 20  # bytes of one text
MOST_ANSWER = 3 << 20  # bytes of all facts together
MOST_ITEMS = 256  # interfaces, files of one folder, GIDs of one device

FILES = {
    "boot_id": "/proc/sys/kernel/random/boot_id",
    "cmdline": "/proc/cmdline",
    "dgx_release": "/etc/dgx-release",
    "earlyoom": "/etc/default/earlyoom",
    "hosts": "/etc/hosts",
    "kernel": "/proc/sys/kernel/osrelease",
    "machine_id": "/etc/machine-id",
    "meminfo": "/proc/meminfo",
    "nvidia_module": "/sys/module/nvidia/version",
    "os_release": "/etc/os-release",
    "swaps": "/proc/swaps",
    "ufw": "/etc/ufw/ufw.conf",
    "uptime": "/proc/uptime",
}
UNITS = """
ssh.service sshd.service earlyoom.service ufw.service firewalld.service NetworkManager.service systemd-networkd.service
avahi-daemon.service systemd-timesyncd.service chrony.service docker.service
"""
COMMANDS = {
    "addresses": "ip -j addr show",
    "gpu_processes": "nvidia-smi --query-compute-apps=pid,used_memory,process_name --format=csv,noheader",
    "ibdev2netdev": "ibdev2netdev",
    "ibstat": "ibstat",
    "lspci": "lspci -D -vv -d 15b3:",
    "neighbours": "ip -j -4 neigh show",
    "nft": "nft list ruleset",
    "routes": "ip -j -4 route show table all",
    "timedatectl": "timedatectl show",
    "units": "systemctl show --property=Id,LoadState,ActiveState,UnitFileState,OOMScoreAdjust " + UNITS,
}
TOOLS = """
avahi-browse docker ethtool ib_write_bw ib_write_lat iperf3 loginctl netplan nmcli ping rsync sudo systemd-run uv
"""
DISTRIBUTIONS = """
accelerate bitsandbytes click datasets deepspeed fastapi numpy nvidia-nccl-cu12 nvidia-nccl-cu13 peft pydantic pyyaml rich
safetensors sparkctl-dgx tensorboard torch transformers uvicorn
"""
GPU_COLUMNS = """
name,uuid,driver_version,memory.total,temperature.gpu,utilization.gpu,power.draw,clocks.current.sm,clocks.max.sm,pstate
""".strip()
PROFILE_FIELDS = """
connection.uuid,connection.id,connection.interface-name,connection.autoconnect,802-3-ethernet.mtu,802-3-ethernet.mac-address,ipv4.method,ipv4.addresses
""".strip()
JOURNAL = "journalctl -k -b -q --no-pager -o short-monotonic -n 1500"  # for the group adm, where dmesg is root's
# Lines of the kernel's log that tell of the GPU, the NIC, memory or the disk.
KERNEL_LINES = re.compile(
    r"mlx5|ib_core|rdma|nvrm|xid|nvidia|oom|out of memory|killed process|nvme|i/o error|aer:", re.I
)
# Keys whose values are nobody's business: a netplan file may hold the Wi-Fi's password.
SECRET_LINE = re.compile(r"""^(.*(?:pass|psk|secret|key|token)[\w-]*["']?\s*:).*$""", re.I)

# What another interpreter knows of its distributions, without importing any of them.
ASK_DISTRIBUTIONS = """\
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = str(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps({"version": "%d.%d.%d" % sys.version_info[:3], "distributions": found}))
"""


class CannotLookError(Exception):
    """Why a fact is unknown. `status` is the failed command's, NOT_INSTALLED where there is no such command."""

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__(why)
        self.status = status


NOT_INSTALLED = 127


def looked(look_at: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """A fact: {"value": ...}, or {"unknown": why} whatever went wrong."""
    try:
        return {"value": look_at(*arguments)}
    except CannotLookError as error:
        return {"unknown": str(error)}
    except Exception as error:  # noqa: BLE001, RUF100 - the other facts must not fall with this one
        return {"unknown": f"{type(error).__name__}: {error}"[:300]}


# How to look.


def environment() -> dict[str, str]:
    """Of every command: plain English, and the folders that a login over ssh may lack."""
    own = {name: value for name, value in os.environ.items() if name != "LANGUAGE"}
    return {
        **own,
        "LC_ALL": "C",
        "PATH": f"{own.get('PATH', '/usr/local/bin:/usr/bin')}:/usr/local/sbin:/usr/sbin:/sbin:/bin",
    }


def which(program: str, *more: str) -> str | None:
    """The path of a program on the PATH, then in `more` folders."""
    return shutil.which(program, path=os.pathsep.join([environment()["PATH"], *more]))


def output(argv: Sequence[str], most: int = MOST_TEXT) -> str:
    """What a command prints: without input, without a shell, at most `most` bytes in COMMAND_SECONDS."""
    program = which(argv[0])
    if program is None:
        raise CannotLookError(f"{argv[0]}: not installed", NOT_INSTALLED)
    name = Path(program).name
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [program, *argv[1:]],
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        env=environment(),
        cwd="/",
        start_new_session=True,  # so that its children end with it
    )
    try:
        text, errors = drained(process, most)
        status = process.wait(1)
    except (subprocess.TimeoutExpired, OverflowError) as error:
        with contextlib.suppress(OSError):  # sudo is root's, and not ours to end
            os.killpg(process.pid, signal.SIGKILL)
        endless = isinstance(error, OverflowError)
        why = f"prints more than {most} bytes" if endless else f"not done after {COMMAND_SECONDS:g} s"
        raise CannotLookError(f"{name}: {why}") from None
    if status != 0:
        said = [line.strip() for line in (errors + "\n" + text).splitlines() if line.strip()]  # nvidia-smi uses stdout
        raise CannotLookError(f"{name}: exit status {status}: {said[0] if said else 'it says nothing'}"[:300], status)
    return text


def drained(process: subprocess.Popen[bytes], most: int) -> list[str]:
    """Both outputs of a process, read until they end."""
    end = time.monotonic() + COMMAND_SECONDS
    streams = [stream for stream in (process.stdout, process.stderr) if stream]
    found = {stream.fileno(): b"" for stream in streams}
    with selectors.DefaultSelector() as waiting:
        for number in found:
            waiting.register(number, selectors.EVENT_READ)
        while waiting.get_map():
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(process.args, COMMAND_SECONDS)
            for key, _ in waiting.select(max(0.0, end - time.monotonic())):
                data = os.read(key.fd, 65536)
                found[key.fd] += data
                if len(found[key.fd]) > most:
                    raise OverflowError
                if not data:
                    waiting.unregister(key.fd)
    for stream in streams:
        stream.close()
    return [data.decode("utf-8", "replace") for data in found.values()]


def contents(path: str | Path) -> str | None:
    """A file's text; None where there is no such file."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_TEXT)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CannotLookError(f"{path}: {error.strerror}") from None
    return data.decode("utf-8", "replace")


def attribute(path: Path) -> str | None:
    """One value of /sys; None where the kernel has none, as for the speed of an interface that is down."""
    try:
        return path.read_bytes()[:4096].decode("utf-8", "replace").strip()
    except OSError:
        return None


def attributes(folder: Path, names: str) -> dict[str, Any]:
    return {name: attribute(folder / name) for name in names.split()}


def inside(folder: str | Path) -> list[Path]:
    """What lies in a folder, sorted; nothing where there is no such folder."""
    try:
        return sorted(Path(folder).iterdir())[:MOST_ITEMS]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CannotLookError(f"{folder}: {error.strerror}") from None


def names(paths: Iterable[Path]) -> list[str]:
    return [path.name for path in paths]


def target(link: Path) -> str | None:
    """The last part of what a symbolic link leads to; None where there is no such link."""
    try:
        return Path(os.readlink(link)).name  # noqa: PTH115 - Path.readlink is younger than 3.8
    except OSError:
        return None


def mode(path: str | Path) -> int | None:
    try:
        return Path(path).stat().st_mode & 0o7777
    except FileNotFoundError:
        return None


def at_home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 - unlike Path.expanduser it raises nothing


# The facts that are more than a file or a command.


def dmi() -> dict[str, Any]:
    return attributes(Path("/sys/class/dmi/id"), "sys_vendor product_name board_name bios_version")


def python() -> str:
    return platform.python_version()


def cpu() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "machine": os.uname().machine}


def cuda() -> dict[str, Any]:
    """What nvcc says (it is often not on the PATH), and each toolkit's version.json."""
    folders = sorted(Path("/usr/local").glob("cuda*"))[:16]
    files = {str(folder): contents(folder / "version.json") for folder in folders}
    nvcc = which("nvcc", *(f"{folder}/bin" for folder in folders))
    return {
        "files": {path: text for path, text in files.items() if text},
        "nvcc": output([nvcc, "--version"]) if nvcc else None,
    }


def gpu() -> str:
    """nvidia-smi's table, with the reasons for low clocks where the driver knows that column."""
    try:
        return output(["nvidia-smi", f"--query-gpu={GPU_COLUMNS},clocks_event_reasons.active", "--format=csv"])
    except CannotLookError as error:
        if "not a valid field" not in str(error):
            raise
    return output(["nvidia-smi", f"--query-gpu={GPU_COLUMNS}", "--format=csv"])


def devices() -> list[str]:
    """The device files through which a GPU and an RDMA NIC are used."""
    nvidia = sorted(path.name for path in Path("/dev").glob("nvidia*"))
    return nvidia + [f"infiniband/{name}" for name in names(inside("/dev/infiniband"))]


def disk(path: str) -> dict[str, Any]:
    """The file system below a path, which need not be there yet. Sizes in bytes."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    there = os.statvfs(place)
    sizes = {"total": there.f_blocks * there.f_frsize, "free": there.f_bavail * there.f_frsize}
    return {"device": place.stat().st_dev, **sizes}


def nics() -> dict[str, Any]:
    return {folder.name: nic(folder) for folder in inside("/sys/class/net") if folder.is_dir()}


def nic(folder: Path) -> dict[str, Any]:
    found = attributes(folder, "flags operstate carrier speed mtu address")
    return {**found, "driver": target(folder / "device/driver"), "pci": target(folder / "device")}


def roce() -> dict[str, Any]:
    return {folder.name: roce_device(folder) for folder in inside("/sys/class/infiniband")}


def roce_device(folder: Path) -> dict[str, Any]:
    found = attributes(folder, "fw_ver hca_type")
    found["uevent"] = attribute(folder / "device/uevent")
    found["interfaces"] = names(inside(folder / "device/net"))
    found["ports"] = {port.name: roce_port(port) for port in inside(folder / "ports")}
    return found


def roce_port(folder: Path) -> dict[str, Any]:
    found = attributes(folder, "state phys_state rate link_layer")
    found["gids"] = []
    for path in inside(folder / "gids"):
        gid = attribute(path)
        if gid and gid.strip("0:"):  # most rows of the table are empty
            kind, interface = (attribute(folder / "gid_attrs" / what / path.name) for what in ("types", "ndevs"))
            found["gids"].append({"index": int(path.name), "gid": gid, "type": kind, "interface": interface})
    return found


def pcie() -> dict[str, Any]:
    """The PCIe links of Mellanox's NICs; readable without root, as lspci's are not."""
    wanted = "current_link_speed current_link_width max_link_speed max_link_width"
    ours = [folder for folder in Path("/sys/bus/pci/devices").iterdir() if attribute(folder / "vendor") == "0x15b3"]
    return {folder.name: attributes(folder, wanted) for folder in sorted(ours)[:MOST_ITEMS]}


def ethtool() -> dict[str, Any]:
    """What ethtool says of each interface that has an RDMA device."""
    interfaces = sorted({path.name for path in Path("/sys/class/infiniband").glob("*/device/net/*")})
    return {name: looked(output, ["ethtool", name]) for name in interfaces}


def networkmanager() -> dict[str, Any] | None:
    """Devices and profiles, which anyone may ask for though their files are root's; null where it does not run."""
    try:
        found = output(["nmcli", "-t", "-f", "DEVICE,TYPE,STATE,CON-UUID", "device"])
    except CannotLookError as error:
        if error.status in (NOT_INSTALLED, 8):  # nmcli(1): NetworkManager is not running
            return None
        raise
    listed = output(["nmcli", "-t", "-f", "UUID,TYPE,FILENAME", "connection", "show"])
    uuids = [line.split(":")[0] for line in listed.splitlines() if ":802-3-ethernet:" in line][:MOST_ITEMS]
    profiles = output(["nmcli", "-t", "-f", PROFILE_FIELDS, "connection", "show", *uuids]) if uuids else ""
    return {"devices": found, "connections": listed, "profiles": profiles}


def networkd() -> list[Any] | None:
    """What networkd configures, of the much more that it knows; null where it does not run."""
    if not inside("/run/systemd/netif/links"):
        return None
    links = json.loads(output(["networkctl", "--json=short", "list"]))["Interfaces"][:MOST_ITEMS]
    kept = ("Name", "AdministrativeState", "NetworkFile")
    return [{**{name: link.get(name) for name in kept}, "addresses": networkd_addresses(link)} for link in links]


def networkd_addresses(link: dict[str, Any]) -> list[Any]:
    kept = ("Family", "Address", "PrefixLength", "ConfigSource")
    return [{name: address.get(name) for name in kept} for address in link.get("Addresses") or []]


def netplan() -> list[Any]:
    """The files that netplan reads; one in /etc hides its namesake in /run, that one its namesake in /lib."""
    folders = ("/lib/netplan", "/run/netplan", "/etc/netplan")
    found = {path.name: path for folder in folders for path in inside(folder) if path.suffix == ".yaml"}
    return [{"path": str(found[name]), "text": looked(netplan_text, found[name])} for name in sorted(found)]


def netplan_text(path: Path) -> str:
    return without_secrets(contents(path) or "")


def without_secrets(text: str) -> str:
    """A YAML text without what stands after, or is indented below, a key that names a password or a key."""
    kept: list[str] = []
    depth: int | None = None  # of the secret that the lines may still belong to
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if depth is not None and (not line.strip() or indent > depth):
            continue
        secret = None if line.lstrip().startswith("#") else SECRET_LINE.match(line)
        depth = indent if secret else None
        kept.append(f'{secret.group(1)} "left out"' if secret else line)
    return "\n".join(kept) + "\n"


def listeners(ports: set[int]) -> list[Any]:
    """Rows of /proc/net/tcp and tcp6 that listen on one of the ports, each with its owner where we may know it."""
    rows = [row.split() for path in ("tcp", "tcp6") for row in (contents(f"/proc/net/{path}") or "").splitlines()[1:]]
    rows = [row for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) in ports]
    owners = {
        name: process
        for process in (Path("/proc").glob("[0-9]*") if rows else ())
        for name in opened_by(process)
        if name and name.startswith("socket:")
    }
    found = [(row[1], int(row[7]), owners.get(f"socket:[{row[9]}]")) for row in rows[:MOST_ITEMS]]
    return [
        {
            "address": address,
            "user": user_name(uid) or str(uid),
            "pid": int(process.name) if process else None,
            "command": attribute(process / "comm") if process else None,
        }
        for address, uid, process in found
    ]


def opened_by(process: Path) -> list[str | None]:
    """What a process's file descriptors lead to; nothing where it is another user's."""
    try:
        return [target(link) for link in (process / "fd").iterdir()]
    except OSError:
        return []


def user_name(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def dmesg() -> str:
    """The kernel's lines since boot that tell of hardware or memory, the last 200."""
    try:
        text = output(["dmesg"], 8 << 20)
    except CannotLookError as error:
        try:
            text = output(JOURNAL.split())
        except CannotLookError:
            raise error from None
    return "\n".join([line[:500] for line in text.splitlines() if KERNEL_LINES.search(line)][-200:])


def limits() -> dict[str, Any]:
    """Soft and hard limits; -1 is none."""
    kinds = {"memlock": resource.RLIMIT_MEMLOCK, "nofile": resource.RLIMIT_NOFILE}
    none = resource.RLIM_INFINITY
    return {name: [-1 if limit == none else limit for limit in resource.getrlimit(kinds[name])] for name in kinds}


def user() -> dict[str, Any]:
    return {"uid": os.getuid(), "name": user_name(os.getuid()), "home": at_home("~")}


def sudo() -> str | None:
    """Whether sudo works without a password, asked with a command that does nothing; null where there is no sudo."""
    if os.getuid() == 0:
        return "passwordless"
    try:
        output(["sudo", "-n", "true"])
    except CannotLookError as error:
        if error.status in (NOT_INSTALLED, 1):
            return "password" if error.status == 1 else None
        raise
    return "passwordless"


def linger() -> bool:
    """Whether the user's systemd manager runs without a login (loginctl(1) leaves this mark)."""
    return user_name(os.getuid()) in names(inside("/var/lib/systemd/linger"))


def user_manager() -> bool:
    return Path(f"/run/user/{os.getuid()}/systemd/private").exists()


def tools() -> dict[str, Any]:
    return {name: which(name) for name in TOOLS.split()}


def packages(interpreter: str) -> dict[str, Any] | None:
    """Versions of what a rank needs, as that interpreter knows them; null where there is no such interpreter."""
    try:
        found = json.loads(output([interpreter, "-I", "-c", ASK_DISTRIBUTIONS, *DISTRIBUTIONS.split()]))
    except CannotLookError as error:
        if error.status == NOT_INSTALLED:
            return None
        raise
    return {"python": interpreter, "version": found["version"], "distributions": found["distributions"]}


def nccl_libraries() -> list[str]:
    """The system's own NCCL, by its file names: libnccl.so.2.28.3."""
    return sorted({path.name for folder in ("*/", "") for path in Path("/usr/lib").glob(f"{folder}libnccl.so.*")})


def sparkctl(home: str) -> dict[str, Any]:
    """What an earlier `sparkctl up` left in $SPARKCTL_HOME and in the user's systemd manager."""
    lists = {what: names(inside(f"{home}/{what}")) for what in ("code", "jobs")}
    unit = contents(at_home("~/.config/systemd/user/sparkctl-job@.service"))
    return {"path": home, "mode": mode(home), "entries": names(inside(home)), **lists, "unit": unit}


def answers(
    python_path: str | None, home: str | None, ports: Iterable[int], disks: Iterable[str]
) -> dict[str, Callable[[], Any]]:
    """Each fact's name and how to look it up, the slow ones first."""
    home = at_home(home or os.environ.get("SPARKCTL_HOME") or "~/.sparkctl")
    interpreter = at_home(python_path or f"{home}/venv/bin/python")
    places = list(dict.fromkeys(["/", at_home("~"), home, *map(at_home, disks)]))
    slow = (gpu, networkmanager, dmesg, networkd, ethtool, sudo, cuda)
    quick = (
        roce,
        pcie,
        nics,
        netplan,
        dmi,
        python,
        cpu,
        devices,
        limits,
        linger,
        nccl_libraries,
        tools,
        user,
        user_manager,
    )
    return {
        **{function.__name__: function for function in slow},
        "packages": lambda: packages(interpreter),
        **{name: functools.partial(output, line.split()) for name, line in COMMANDS.items()},
        **{function.__name__: function for function in quick},
        "disks": lambda: {path: looked(disk, path) for path in places},
        "hostname": socket.gethostname,
        "listeners": lambda: listeners(set(ports)),
        "sparkctl": lambda: sparkctl(home),
        "ssh_folder": lambda: mode(at_home("~/.ssh")),
        **{name: functools.partial(contents, path) for name, path in FILES.items()},
    }


def main(
    python_path: str | None = None, home: str | None = None, ports: Iterable[int] = (), disks: Iterable[str] = ()
) -> None:
    """Look everything up at once, print it, and end the process."""
    began, clock = time.time(), time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(16)
    waiting = {name: pool.submit(looked, look) for name, look in answers(python_path, home, ports, disks).items()}
    concurrent.futures.wait(waiting.values(), ALL_SECONDS)
    facts, size = [], 0
    for name, future in waiting.items():
        fact = future.result() if future.done() else {"unknown": f"not done after {ALL_SECONDS:g} s"}
        text = encoded(fact)
        if size + len(text) > MOST_ANSWER:
            text = encoded({"unknown": "left out: the answer would be too large"})
        size += len(text)
        facts.append(encoded(name) + b": " + text)
    head = encoded({"sparkctl_probe": VERSION, "time": began, "duration": round(time.monotonic() - clock, 3)})
    # A line of its own, whatever the user's shell has printed before.
    sys.stdout.buffer.write(b"\n" + head[:-1] + b', "facts": {' + b", ".join(facts) + b"}}\n")
    sys.stdout.flush()
    os._exit(0)  # a look-up that hangs must not keep us


def encoded(value: Any) -> bytes:
    """As JSON on one line; a file's name that is no text loses the bytes that are none."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def script(
    *, python_path: str | None = None, home: str | None = None, ports: Iterable[int] = (), disks: Iterable[str] = ()
) -> bytes:
    """This file as the bytes to pipe to ARGV on a node, with the call of `main` at its end.

    Args:
        python_path: the interpreter that is asked for its packages' versions; else $SPARKCTL_HOME/venv's.
        home: the node's $SPARKCTL_HOME; else what the node says it is.
        ports: who listens on these is told.
        disks: paths whose free space is told, beside `/`, $HOME and $SPARKCTL_HOME.
    """
    asked = json.dumps({"python_path": python_path, "home": home, "ports": list(ports), "disks": list(disks)})
    # JSON in ASCII inside a Python literal: whatever stands there stays text.
    return Path(__file__).read_bytes() + f"\nmain(**json.loads({asked!r}))\n".encode("ascii")
