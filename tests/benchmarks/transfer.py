"""What carries a model between two hosts how fast: our copier, `rsync -W` over SSH, and iperf3 -P4 for what the link would take.

    python -m tests.benchmarks.transfer [--gib 2] [--rounds 5]

Two simulated hosts on this machine (root, see tests/lab); the three take turns, so that what else the machine does hits them alike.
Files are random bytes on tmpfs. rsync checks what it copies by its own checksum; the copier by XXH3, chunk by chunk, in the
environment that `up` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median

from cluster import transfer
from cluster.transfer import End, rsync
from cluster.transfer.manifest import Manifest, whole
from cluster.transport.hostkeys import KnownHosts
from cluster.transport.ssh import SshTransport
from tests.lab import Host, Lab

SOURCE, MADE = "/home/spark/model", "/home/spark/.sparkctl/halves/made"
HOME = "/home/spark/.sparkctl"
FILES = 4


def main() -> None:
    """Print the table."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    asked.add_argument("--gib", type=float, default=2.0)
    asked.add_argument("--rounds", type=int, default=5)
    wanted = asked.parse_args()
    if missing := Lab.missing():
        raise SystemExit(missing)
    each = int(wanted.gib * 2**30 / FILES)
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(init="simple", bind=[sys.prefix], disk=int(wanted.gib * 2**30) + (2 << 30)))
        prepare(lab, each)
        ends = [stack.enter_context(_node(lab, host)) for host in lab.hosts]
        addresses = [(f"192.168.100.{10 + number}", f"192.168.101.{10 + number}") for number in (0, 1)]
        pair = [End(node, own, f"{sys.prefix}/bin/python") for node, own in zip(ends, addresses, strict=True)]
        ways: dict[str, Callable[[], float]] = {
            "copier": lambda: copier(pair, each),
            "rsync -W over SSH": lambda: rsynced(lab.hosts[1], each),
            "iperf3 -P4": lambda: iperf(lab.hosts),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(wanted.rounds):
            for name, way in ways.items():
                rates[name].append(way())
                lab.hosts[1].run(["rm", "-rf", MADE])
    show(rates, wanted.gib)


def show(rates: dict[str, list[float]], gib: float) -> None:
    """A line each, and the ratios of the medians."""
    print(
        f"{gib:g} GiB in {FILES} files between two simulated hosts, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    for name, found in rates.items():
        print(
            f"  {name:20} median {median(found):6.0f} MB/s   ({min(found):.0f} to {max(found):.0f}, {len(found)} rounds)"
        )
    ours, theirs, most = (median(found) for found in rates.values())
    print(f"  copier / rsync {ours / theirs:.2f}   copier / iperf3 {ours / most:.2f}")


def prepare(lab: Lab, each: int) -> None:
    """Addresses, files, and the peer's key for the head, as `up` makes it."""
    for number, host in enumerate(lab.hosts):
        for rail, interface in enumerate(host.rails):
            host.run(["ip", "addr", "add", f"192.168.10{rail}.{10 + number}/24", "dev", interface], "root")
            host.run(["ip", "link", "set", "dev", interface, "mtu", "9000"], "root")
    head, peer = lab.hosts
    head.run(["mkdir", SOURCE])
    for number in range(FILES):
        head.run(["openssl", "rand", "-out", f"{SOURCE}/{number}", str(each)], timeout=300)
    peer.run(["mkdir", "-p", "-m", "700", f"{HOME}/ssh", f"{HOME}/halves"])
    peer.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{HOME}/ssh/id_ed25519"])
    peer.write(f"{HOME}/ssh/known_hosts", f"192.168.100.10 {head.host_key()}\n", mode=0o600)
    key = peer.read(f"{HOME}/ssh/id_ed25519.pub").decode()
    known = head.read(f"{head.home}/.ssh/authorized_keys").decode()
    head.write(f"{head.home}/.ssh/authorized_keys", f"{known.rstrip()}\n{key}", mode=0o600)


def _node(lab: Lab, host: Host) -> SshTransport:
    known = KnownHosts(lab.known_hosts)
    return SshTransport(host.name, host.address, user="spark", identity_file=str(lab.identity_file), known_hosts=known)


def copier(pair: list[End], each: int) -> float:
    """MB/s, from the order to the verified folder."""
    what = Manifest(tuple(whole(str(number), each) for number in range(FILES)))
    began = time.monotonic()
    transfer.over_link(pair[0], SOURCE, pair[1], MADE, what, lambda progress: None)
    return FILES * each / 1e6 / (time.monotonic() - began)


def rsynced(peer: Host, each: int) -> float:
    """MB/s, as our own fallback calls it."""
    began = time.monotonic()
    peer.run(rsync.argv("spark@192.168.100.10", SOURCE, MADE, HOME), timeout=600)
    return FILES * each / 1e6 / (time.monotonic() - began)


def iperf(hosts: tuple[Host, ...], seconds: int = 3) -> float:
    """MB/s of four streams over one rail, from head to peer, with nothing read or written."""
    head, peer = hosts
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = peer.start(["iperf3", "-s", "-1", "-B", "192.168.100.11"], **quiet)
    try:
        for _ in range(100):
            done = head.run(
                ["iperf3", "-J", "-P", "4", "-t", str(seconds), "-c", "192.168.100.11"], check=False, timeout=60
            )
            summed = json.loads(done.stdout or "{}").get("end", {}).get("sum_received")
            if summed:
                return float(summed["bits_per_second"]) / 8e6
            time.sleep(0.1)
        raise SystemExit("iperf3 does not answer")
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
