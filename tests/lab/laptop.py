"""This machine's side of a lab: one interface on the management network, and a home folder to reach the hosts from."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network
from pathlib import Path

from .disk import USER
from .host import Host
from .machine import ip_in
from .processes.room import LAPTOP, MANAGEMENT_BRIDGE

POOLS = ("198.18.0.0/16", "10.77.0.0/16")
"""Where management networks come from; the first is set aside for benchmarks (RFC 2544), so seldom in use."""


def plug_in(room: int) -> tuple[str, IPv4Network]:
    """Put this machine, as .1, on the management network of the wire room (the pid of a process in it).

    Returns the interface and the network. The interface's name holds the number of the network, and the kernel gives a name
    only once: so two labs never take the same. Raises RuntimeError when no network is free.
    """
    taken = list(_routed())
    candidates = itertools.chain.from_iterable(IPv4Network(pool).subnets(new_prefix=24) for pool in POOLS)
    for number, network in enumerate(candidates):
        name = f"sparklab{number}"
        if any(network.overlaps(other) for other in taken) or not _add(name, room):
            continue
        Path(f"/proc/sys/net/ipv4/conf/{name}/forwarding").write_text("0")  # hosts reach this machine and no further
        here = [f"addr add {network[1]}/24 dev {name}", f"link set {name} up"]
        subprocess.run(["ip", "-batch", "-"], input="\n".join(here) + "\n", text=True, check=True)
        ip_in(room, [f"link set {LAPTOP} up master {MANAGEMENT_BRIDGE}"])
        return name, network
    raise RuntimeError(f"no /24 is free in {' or '.join(POOLS)}")


def unplug(name: str) -> None:
    """Remove the interface; no harm if it went with its far end."""
    subprocess.run(["ip", "link", "del", "dev", name], capture_output=True, check=False)


def _routed() -> Iterator[IPv4Network]:
    shown = subprocess.run(
        ["ip", "-j", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=True
    )
    for route in json.loads(shown.stdout or "[]"):
        if route["dst"] != "default":
            yield IPv4Network(route["dst"])


def _add(name: str, room: int) -> bool:
    """False if an interface of that name is there."""
    add = ["ip", "link", "add", "name", name, "type", "veth", "peer", "name", LAPTOP, "netns", str(room)]
    made = subprocess.run(add, capture_output=True, text=True, check=False)
    if made.returncode and "File exists" not in made.stderr:
        raise RuntimeError(f"{' '.join(add)}: {made.stderr.strip()}")
    return made.returncode == 0


def make_keys(paths: Sequence[Path]) -> None:
    """An Ed25519 key pair at each path, without a passphrase."""
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C"]
    for running in [subprocess.Popen([*argv, path.name, "-f", path]) for path in paths]:
        if running.wait():
            raise RuntimeError("ssh-keygen failed")


def furnish(home: Path, hosts: Sequence[Host], keys: Sequence[str]) -> None:
    """Write the files of a laptop user who knows both hosts, whose host keys are ``keys``."""
    ssh = home / ".ssh"
    (ssh / "known_hosts").write_text(known_hosts(hosts, keys))
    (ssh / "config").write_text(ssh_config(hosts, ssh))
    (home / "inventory.yaml").write_text(inventory(hosts, ssh / "id_ed25519"))


def known_hosts(hosts: Sequence[Host], keys: Sequence[str]) -> str:
    return "".join(f"{host.address} {key}\n" for host, key in zip(hosts, keys, strict=True))


def ssh_config(hosts: Sequence[Host], ssh: Path) -> str:
    """For ``ssh -F``: both hosts by name, this lab's keys and no other."""
    every = f"""\
Host *
    User {USER}
    IdentityFile {ssh}/id_ed25519
    IdentitiesOnly yes
    UserKnownHostsFile {ssh}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
"""
    return every + "".join(f"\nHost {host.name}\n    HostName {host.address}\n" for host in hosts)


def inventory(hosts: Sequence[Host], identity: Path) -> str:
    """The pair as an inventory.yaml; flow style, since JSON strings are YAML's too."""
    nodes = "".join(
        f"  - {{name: {json.dumps(host.name)}, host: {host.address}, user: {USER}, identity_file: {json.dumps(str(identity))}}}\n"
        for host in hosts
    )
    return f"nodes:\n{nodes}link: {{mtu: 9000, subnets: [192.168.100.0/24, 192.168.101.0/24]}}\n"
