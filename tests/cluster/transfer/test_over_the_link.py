"""Two simulated hosts: what a node needs reaches it over both rails, whatever happens on the way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import transfer
from cluster.errors import FailedError, RefusedError
from cluster.transfer import End, Progress
from cluster.transfer.manifest import CHUNK, Manifest, Piece, Target, whole
from cluster.transport.hostkeys import KnownHosts
from cluster.transport.ssh import SshTransport
from tests.lab import Host, Lab, eventually

pytestmark = pytest.mark.timeout(300)

SIZE = 12 * CHUNK + 777
SOURCE, MADE = "/home/spark/model", "/home/spark/.sparkctl/halves/made"
WHAT = Manifest((whole("weights", SIZE), Target("cut", 1008, b"safehead", (Piece(8, "weights", CHUNK + 1, 1000),))))


@dataclass
class Pair:
    lab: Lab
    ends: tuple[End, End]

    def carry(self, watch: transfer.Watch = lambda _: None, *, what: Manifest = WHAT) -> None:
        transfer.over_link(self.ends[0], SOURCE, self.ends[1], MADE, what, watch)

    def assert_carried(self) -> None:
        head, peer = self.lab.hosts
        assert peer.run(["find", MADE, "-type", "f", "-printf", "%P %s %m\n"]).stdout.split("\n")[:-1] in (
            [f"weights {SIZE} 600", "cut 1008 600"],
            ["cut 1008 600", f"weights {SIZE} 600"],
        )
        for command in ("sha256sum {}/weights", f"tail -c +{CHUNK + 2} {{}}/weights | head -c 1000 | sha256sum"):
            there, here = (command.format(folder) for folder in (SOURCE, MADE))
            assert shell(head, there).split()[0] == shell(peer, here).split()[0]
        assert shell(peer, f"tail -c +9 {MADE}/cut | sha256sum").split()[0] == shell(head, there).split()[0]
        assert shell(peer, f"ls -A {MADE}/..").split() == ["made"]


def shell(host: Host, command: str) -> str:
    return str(host.run(["sh", "-c", command]).stdout)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if missing := Lab.missing():
        (pytest.skip if os.geteuid() else pytest.fail)(missing)
    with Lab(init="simple", disk=2 << 30) as found:
        for number, host in enumerate(found.hosts):
            for rail, interface in enumerate(host.rails):
                host.run(["ip", "addr", "add", f"192.168.10{rail}.{10 + number}/24", "dev", interface], "root")
        head, peer = found.hosts
        shell(head, f"mkdir {SOURCE} && openssl rand -out {SOURCE}/weights {SIZE}")
        # As `up` leaves it: the peer's key, which the head lets in.
        shell(peer, "mkdir -p -m 700 .sparkctl/ssh && ssh-keygen -q -t ed25519 -N '' -f .sparkctl/ssh/id_ed25519")
        peer.write(".sparkctl/ssh/known_hosts", f"192.168.100.10,192.168.101.10 {head.host_key()}\n", mode=0o600)
        key = peer.read(f"{peer.home}/.sparkctl/ssh/id_ed25519.pub").decode()
        shell(head, f"echo 'restrict {key.strip()}' >> .ssh/authorized_keys")
        yield found


@pytest.fixture
def pair(lab: Lab) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        ends = []
        for number, host in enumerate(lab.hosts):
            node = SshTransport(
                host.name,
                host.address,
                user="spark",
                identity_file=str(lab.identity_file),
                known_hosts=KnownHosts(lab.known_hosts),
            )
            stack.enter_context(node)
            ends.append(End(node, (f"192.168.100.{10 + number}", f"192.168.101.{10 + number}")))
        yield Pair(lab, (ends[0], ends[1]))
    for host in lab.hosts:
        shell(host, "rm -rf .sparkctl/halves")
        eventually(lambda host=host: not helpers(host), 20, "the end of the copiers")


def helpers(host: Host) -> list[int]:
    return [
        process.pid
        for process in host.processes()
        if any("exec(compile(" in word or word == "rsync" for word in process.argv)
    ]


def test_both_rails_carry_and_the_management_network_does_not(pair: Pair) -> None:
    peer = pair.lab.hosts[1]
    before = {name: peer.counters(name).received for name in (*peer.rails, "enP7s7")}
    seen: list[Progress] = []
    pair.carry(seen.append)
    pair.assert_carried()
    came = {name: peer.counters(name).received - before[name] for name in before}
    assert all(came[rail] > SIZE / 10 for rail in peer.rails)
    assert came["enP7s7"] < 2 << 20
    assert (seen[-1].done, seen[-1].total, seen[-1].how) == (WHAT.moved, WHAT.moved, "over the link")


def test_an_interruption_costs_only_what_was_under_way(pair: Pair) -> None:
    pair.lab.slow(None, 120)
    peer = pair.lab.hosts[1]

    def end_it(progress: Progress) -> None:
        if progress.done > 8 * CHUNK:  # at most four are under way, so four at least are whole
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            pair.carry(end_it)
        eventually(lambda: not helpers(peer), 20, "the end of the copier")
    finally:
        pair.lab.slow(None, None)
    assert peer.run(["test", "-e", MADE], check=False).returncode
    before = sum(peer.counters(rail).received for rail in peer.rails)
    pair.carry()
    pair.assert_carried()
    assert sum(peer.counters(rail).received for rail in peer.rails) - before < SIZE


def test_a_copier_that_is_killed_is_told_and_taken_up_from(pair: Pair) -> None:
    pair.lab.slow(None, 120)
    peer = pair.lab.hosts[1]

    def kill(progress: Progress) -> None:
        if progress.done > 2 * CHUNK:
            for pid in helpers(peer):
                os.kill(pid, 9)

    try:
        with pytest.raises(FailedError, match=peer.name):
            pair.carry(kill)
    finally:
        pair.lab.slow(None, None)
    pair.carry()
    pair.assert_carried()


def test_a_rail_that_is_cut_leaves_it_to_the_other(pair: Pair) -> None:
    pair.lab.cut(0)
    try:
        pair.carry()
    finally:
        pair.lab.heal(0)
    pair.assert_carried()


def test_closed_ports_leave_it_to_rsync(pair: Pair) -> None:
    head = pair.lab.hosts[0]
    refuse = "ip daddr 192.168.100.0/23 tcp dport != 22 reject with tcp reset"
    chain = "add chain ip t c { type filter hook input priority 0; }"
    head.run(["nft", f"add table ip t; {chain}; add rule ip t c {refuse}"], "root")
    seen: list[Progress] = []
    try:
        pair.carry(seen.append)
    finally:
        head.run(["nft", "delete", "table", "ip", "t"], "root")
    pair.assert_carried()
    assert seen[-1] == Progress("spark-b", WHAT.size, WHAT.size, "rsync over SSH")
    assert shell(head, "ls -A .sparkctl/halves") == ""


def test_a_full_disk_is_refused_before_anything_is_sent(pair: Pair) -> None:
    peer = pair.lab.hosts[1]
    before = sum(peer.counters(rail).received for rail in peer.rails)
    peer.fill_disk(leave=100 << 20)
    try:
        with pytest.raises(RefusedError) as refused:
            pair.carry()
    finally:
        peer.free_disk()
    assert refused.value.message.startswith("spark-b: no room for made: it takes 0.3 GiB, and 0.1 GiB are free in ")
    assert sum(peer.counters(rail).received for rail in peer.rails) - before < 1 << 20
    assert shell(peer, "ls -A .sparkctl/halves") == ""


def test_the_laptops_own_files_reach_a_node_through_ssh(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(os.urandom(3 * CHUNK + 5))
    what = Manifest((whole("weights", 3 * CHUNK + 5),))
    transfer.from_here(str(tmp_path), pair.ends[1].transport, MADE, what, lambda _: None)
    there = pair.lab.hosts[1].run(["cat", f"{MADE}/weights"], text=False).stdout
    assert there == (tmp_path / "weights").read_bytes()


def test_a_source_is_not_read_beyond_its_folder(pair: Pair) -> None:
    head, peer = pair.lab.hosts
    shell(head, f"ln -s /etc/hostname {SOURCE}/out")
    with pytest.raises(FailedError, match=r"made could not be copied: 'out' leads out of /home/spark/model"):
        pair.carry(what=Manifest((whole("out", 8),)))
    assert peer.run(["test", "-e", MADE], check=False).returncode


def test_nothing_listens_once_it_is_done_and_never_beside_the_link(pair: Pair) -> None:
    head = pair.lab.hosts[0]
    listening: list[str] = []

    def look(progress: Progress) -> None:
        listening.append(head.run(["ss", "-Hltn"]).stdout)

    before = ports(head.run(["ss", "-Hltn"]).stdout)
    pair.carry(look)
    ours = ports("".join(listening)) - before
    assert {address.rpartition(":")[0] for address in ours} == {"192.168.100.10", "192.168.101.10"}
    eventually(lambda: ports(head.run(["ss", "-Hltn"]).stdout) == before, 20, "the end of listening")


def ports(shown: str) -> set[str]:
    return {line.split()[3] for line in shown.splitlines()}
