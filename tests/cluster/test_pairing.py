"""Two simulated Sparks become a pair and cease to be one, whatever happens on the way."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster import discover, inventory, pairing, record, transport
from cluster.errors import FailedError, RefusedError
from cluster.inventory import Inventory
from cluster.pairing import Paired, Proposal
from cluster.survey import Unfinished
from cluster.transaction import Outcome
from cluster.transport.hostkeys import ChangedHostKeyError, UnknownHostKeyError
from cluster.transport.sudo import Sudo, SudoError
from cluster.wishes import INSTALLED
from tests import wheels
from tests.lab import Host, Lab, eventually

pytestmark = pytest.mark.timeout(300)

# What `down` must put back: files with their content, mode, owner; what keeps services running; interfaces, addresses, routes.
DIGEST = r"""
cd "$0"
for folder in /etc .ssh; do
  find "$folder" -type f -exec sha256sum {} +
  find "$folder" -printf "%p %m %u %g %l\n"
done
ls /var/lib/systemd/linger
ip -o link | sed 's/ qlen.*//; s/@if[0-9]*:/:/'
ip -4 -o addr
ip -4 route | sed 's/ metric [0-9]*//'  # NetworkManager counts its activations in them
"""
OURS = ("click", "pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection", "pyyaml")
KEPT_FOR = 60.0  # seconds: NetworkManager took addresses that it did not know of away within 54


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if missing := Lab.missing():
        (pytest.skip if os.geteuid() else pytest.fail)(missing)


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a rank needs, as wheels: hollow but for what our own code imports as it is verified."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    folder.chmod(0o755)
    for name in OURS:
        wheels.pack(folder, name)
    for name in set(INSTALLED) - set(OURS):
        wheels.hollow(folder, name)
    return folder


@pytest.fixture(scope="module")
def lab(wheelhouse: Path) -> Iterator[Lab]:
    with Lab(
        bind=[sys.prefix, wheelhouse], disk=24 << 30
    ) as lab:  # of the disk's bytes none is taken before it is used
        yield settled(lab)


@pytest.fixture(scope="module")
def kept() -> Iterator[tuple[Lab, list[set[str]], float]]:
    """A second pair, which is made first and then left alone: the lab, its digests before, and when it was made."""
    with Lab(home="/home/spark of ours", bind=[sys.prefix]) as lab:
        with pytest.MonkeyPatch.context() as patch:
            pair = Pair(settled(lab))
            pair.live_at(patch)
            before = pair.digests()
            assert pair.up() is not None
        yield lab, before, time.monotonic()


@pytest.fixture
def pair(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """A pair that is not made; whatever a test makes of it is undone."""
    pair = Pair(lab)
    pair.live_at(monkeypatch)
    yield pair
    if record.here().exists():
        pair.down()


@dataclass
class Answers:
    """What a test answers to `up`, and what it was told."""

    accept_keys: bool = False
    approved: bool = True
    on: Callable[[str, str], object] = lambda node, said: None
    told: list[str] = field(default_factory=list)
    mended: list[Unfinished] = field(default_factory=list)
    proposal: Proposal | None = None

    def accept(self, unknown: UnknownHostKeyError) -> bool:
        return self.accept_keys

    def mend(self, left: Sequence[Unfinished]) -> bool:
        self.mended += left
        return True

    def approve(self, proposal: Proposal) -> bool:
        self.proposal = proposal
        return self.approved

    def tell(self, node: str, said: str) -> None:
        self.told.append(f"{node}: {said}")
        self.on(node, said)


class Pair:
    """A lab as somebody who pairs it sees it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.head, self.peer = lab.hosts
        self.python: str | None = f"{sys.prefix}/bin/python"

    def live_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(self.lab.home))
        monkeypatch.delenv("SPARKCTL_HOME", raising=False)
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)

    def inventory(self) -> Inventory:
        path = self.lab.home / "pair.yaml"
        python = f"python: {self.python}, identity_file" if self.python else "identity_file"
        path.write_text(self.lab.inventory().replace("identity_file", python))
        return inventory.load(path)

    def up(
        self, answers: Answers | None = None, *, sudo: Sudo | None = None, wheelhouse: str | None = None
    ) -> Paired | None:
        mine = self.inventory()
        transports = [transport.to(node) for node in mine.nodes]
        try:
            return pairing.up(
                mine, transports, answers or Answers(), sudo=sudo or Sudo(), wheelhouse=wheelhouse, seconds=None
            )
        finally:
            for one in transports:
                one.close()

    def down(self, *, purge: bool = False, sudo: Sudo | None = None) -> tuple[Outcome, ...]:
        mine = self.inventory()
        transports = [transport.to(node) for node in mine.nodes]
        try:
            return pairing.down(mine, transports, Answers(), sudo=sudo or Sudo(), purge=purge)
        finally:
            for one in transports:
                one.close()

    def digests(self) -> list[set[str]]:
        return [digest(host) for host in self.lab.hosts]

    def assert_still(self, before: list[set[str]]) -> None:
        """All is as it was, at the latest when services have settled."""
        end = time.monotonic() + 10
        while (now := self.digests()) != before and time.monotonic() < end:
            time.sleep(0.2)
        assert [sorted(was ^ is_) for was, is_ in zip(before, now, strict=True)] == [[], []]


def digest(host: Host) -> set[str]:
    shown: str = host.run(["sh", "-c", DIGEST, host.home], "root").stdout
    return set(shown.splitlines())


def addresses(host: Host) -> list[str]:
    shown: str = host.run(["ip", "-4", "-o", "addr"]).stdout
    return [line.split()[3] for line in shown.splitlines() if " 192.168.10" in line]


def settled(lab: Lab) -> Lab:
    """sshd answers before the network service is done."""
    for host in lab.hosts:
        eventually(lambda host=host: "default" in host.run(["ip", "-4", "route"]).stdout, 20, "the default route")
    return lab


def test_a_home_with_spaces_is_no_hindrance(kept: tuple[Lab, list[set[str]], float]) -> None:
    lab, _, _ = kept
    shown = lab.hosts[0].run(["systemctl", "--user", "show", "sparkctl-job@x", "-P", "ExecStart"]).stdout
    assert "-m sparkctl agent /home/spark of ours/.sparkctl/jobs/x " in shown


def test_up_makes_a_pair_again_changes_nothing_and_down_puts_every_byte_back(pair: Pair) -> None:
    before = pair.digests()
    looking = Answers(approved=False)
    assert pair.up(looking) is None
    pair.assert_still(before)
    assert pair.head.run(["test", "-e", ".sparkctl"], check=False).returncode
    assert looking.proposal is not None
    proposed = [plan.describe() for plan in looking.proposal.planned[0]]
    assert any(
        "write /etc/netplan/40-cx7.yaml (mode 600, owner root), then `netplan apply`" in text for text in proposed
    )

    paired = pair.up()
    assert paired is not None
    assert paired.changed
    assert addresses(pair.head) == ["192.168.100.10/24", "192.168.101.10/24"]
    assert addresses(pair.peer) == ["192.168.100.11/24", "192.168.101.11/24"]
    assert pair.head.read(f"/sys/class/net/{pair.head.rails[1]}/mtu") == b"9000\n"
    for host in pair.lab.hosts:
        assert host.run(["stat", "-c", "%a %U", "/etc/netplan/40-cx7.yaml"]).stdout == "600 root\n"
        assert host.run(["stat", "-c", "%a", ".sparkctl"]).stdout == "700\n"
        assert host.read(f"{host.home}/.sparkctl/pair.json") == record.here().read_bytes()
        assert "sparkctl-job@.service" in host.run(["systemctl", "--user", "list-unit-files", "--no-legend"]).stdout
        assert host.run(["loginctl", "show-user", "spark", "-P", "Linger"]).stdout == "yes\n"
    assert record.load(pair.inventory()) == paired.record

    made = pair.digests()
    again = pair.up()
    assert again is not None
    assert not again.changed
    pair.assert_still(made)

    assert all(outcome.complete for outcome in pair.down(purge=True))
    pair.assert_still(before)
    assert not record.here().exists()
    assert pair.head.run(["test", "-e", ".sparkctl"], check=False).returncode


def test_a_node_opens_the_other_over_the_link_only(pair: Pair) -> None:
    pair.up()
    keys = ".sparkctl/ssh"
    ssh = ["ssh", "-i", f"{keys}/id_ed25519", "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"]
    known = ["-o", f"UserKnownHostsFile={keys}/known_hosts", "-o", "ConnectTimeout=5"]
    for here, there in ((pair.head, "192.168.101.11"), (pair.peer, "192.168.100.10")):
        assert here.run([*ssh, *known, there, "id", "-un"]).stdout == "spark\n"
    trusting = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    refused = pair.head.run([*ssh, *trusting, pair.peer.address, "true"], check=False)
    assert "Permission denied" in refused.stderr
    assert pair.head.read(f"{pair.head.home}/{keys}/id_ed25519") != pair.peer.read(
        f"{pair.peer.home}/{keys}/id_ed25519"
    )


@pytest.mark.parametrize("mending", ["up", "down"])
def test_power_lost_in_the_middle_is_mended_by_the_next(
    pair: Pair, mending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.transport.dial.DEAD_AFTER", 2)  # seconds, so that the test is soon over
    before = pair.digests()

    def pull(node: str, said: str) -> None:
        if node == pair.peer.name and said.startswith("write /etc/netplan") and pair.peer.on:
            pair.peer.power_off()

    with pytest.raises(FailedError, match=pair.peer.name):
        pair.up(Answers(on=pull))
    pair.peer.power_on()
    if mending == "up":
        answers = Answers()
        assert pair.up(answers) is not None
        assert [left.node for left in answers.mended] == [pair.peer.name]
    assert all(outcome.complete for outcome in pair.down())
    pair.assert_still(before)


def test_a_second_up_says_who_is_at_it(pair: Pair) -> None:
    refused: list[RefusedError] = []

    def meanwhile(node: str, said: str) -> None:
        if node == "" and not refused:
            with pytest.raises(RefusedError) as told:
                pair.up()
            refused.append(told.value)

    assert pair.up(Answers(on=meanwhile)) is not None
    assert " is changing it since " in refused[0].message


def test_a_host_that_does_not_answer_is_named_and_the_other_left_alone(pair: Pair) -> None:
    before = digest(pair.head)
    pair.peer.sshd(False)
    try:
        with pytest.raises(FailedError, match=pair.peer.name):
            pair.up()
    finally:
        pair.peer.sshd(True)
    assert digest(pair.head) == before


def test_a_changed_host_key_is_refused(pair: Pair) -> None:
    before = pair.digests()
    known = pair.lab.known_hosts.read_text()
    wrong = pair.head.host_key().split()[1]
    pair.lab.known_hosts.write_text(known.replace(pair.peer.host_key().split()[1], wrong))
    try:
        with pytest.raises(ChangedHostKeyError, match=pair.peer.name):
            pair.up(Answers(accept_keys=True))
    finally:
        pair.lab.trust()
    pair.assert_still(before)


def test_an_unknown_host_key_is_refused_unless_accepted(pair: Pair) -> None:
    known = pair.lab.known_hosts.read_text()
    pair.lab.known_hosts.write_text("")
    try:
        with pytest.raises(UnknownHostKeyError, match="SHA256:"):
            pair.up()
        assert pair.lab.known_hosts.read_text() == ""
        pair.up(Answers(accept_keys=True, approved=False))
        assert sorted(pair.lab.known_hosts.read_text().splitlines()) == sorted(known.splitlines())
    finally:
        pair.lab.trust()


def test_sudo_may_want_a_password_which_is_kept_nowhere(pair: Pair) -> None:
    secret = "correct horse battery"
    asked: list[str] = []

    def ask(node: str) -> str:
        asked.append(node)
        return secret

    before = pair.digests()
    for host in pair.lab.hosts:
        host.sudo_password(secret)
    try:
        with_password = pair.digests()
        with pytest.raises(SudoError, match="wants a password"):
            pair.up()
        pair.assert_still(with_password)
        assert pair.up(sudo=Sudo(ask)) is not None
        assert len(asked) == 1
        for host in pair.lab.hosts:
            assert (
                host.run(["grep", "-r", secret, "/etc", "/home", "/var/log", "/tmp"], "root", check=False).stdout == ""
            )
        assert all(outcome.complete for outcome in pair.down(sudo=Sudo(ask)))
        pair.assert_still(with_password)
    finally:
        for host in pair.lab.hosts:
            host.sudo_password(None)
    assert len(before) == len(with_password)


def test_a_full_disk_is_refused_and_nothing_is_written(pair: Pair) -> None:
    before = pair.digests()
    pair.head.fill_disk()
    try:
        with pytest.raises(RefusedError, match=f"{pair.head.name}: 0 MiB free"):
            pair.up()
    finally:
        pair.head.free_disk()
    pair.assert_still(before)


def test_another_netplan_file_for_the_interface_is_refused_by_name(pair: Pair) -> None:
    path = "/etc/netplan/50-mine.yaml"
    claim = f"network: {{version: 2, ethernets: {{{pair.peer.rails[0]}: {{dhcp4: true}}}}}}\n"
    pair.peer.write(path, claim, user="root", mode=0o600)
    try:
        with pytest.raises(RefusedError, match=rf"{pair.peer.name}: {path} and /etc/netplan/40-cx7\.yaml"):
            pair.up()
    finally:
        pair.peer.run(["rm", path], "root")


def test_what_netplan_would_not_take_is_never_written(pair: Pair) -> None:
    path = "/etc/netplan/90-broken.yaml"
    pair.peer.write(path, "network: {version: 2, ethernets: {eth9: {dhcp4: perhaps}}}\n", user="root", mode=0o600)
    before = pair.digests()
    try:
        with pytest.raises(FailedError, match=r"40-cx7\.yaml is not written: .*90-broken\.yaml.*perhaps") as told:
            pair.up()
        assert pair.peer.name in told.value.message
        pair.assert_still(before)
        assert pair.peer.run(["sh", "-c", "ls -d /run/tmp*"], "root", check=False).stdout == ""
    finally:
        pair.peer.run(["rm", path], "root")


def test_an_interpreter_that_cannot_run_a_job_is_refused_before_anything_is_done(pair: Pair) -> None:
    before = pair.digests()
    pair.python = "/usr/bin/python3"
    with pytest.raises(RefusedError, match=r"/usr/bin/python3 lacks torch, .*click, pydantic") as told:
        pair.up()
    assert "take `python` out of the inventory" in told.value.fix
    pair.assert_still(before)


def _kept(host: Host) -> set[str]:
    """What an earlier test left of ours, but for the journal, which is there once `up` has begun."""
    return set(host.run(["ls", ".sparkctl"], check=False).stdout.split()) - {"journal"}


def test_the_ranks_environment_is_installed_from_a_folder_of_wheels(pair: Pair, wheelhouse: Path) -> None:
    pair.python = None  # so `up` makes the environment
    before, kept = pair.digests(), _kept(pair.head)
    for host in pair.lab.hosts:  # the interpreter that the wheels were made for
        same = f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3.{sys.version_info.minor} "$@"\n'
        host.write("/usr/local/bin/python3", same, user="root", mode=0o755)
    try:
        with pytest.raises(FailedError, match="/srv: holds no wheel of torch, transformers, ") as told:
            pair.up(wheelhouse="/srv")
        assert "what this run had changed is undone" in told.value.fix
        pair.assert_still(before)
        assert _kept(pair.head) == kept

        paired = pair.up(wheelhouse=str(wheelhouse))
        assert paired is not None
        for host, node in zip(pair.lab.hosts, paired.record.nodes, strict=True):
            assert node.python == f"{host.home}/.sparkctl/venv/bin/python"
            shown = host.run([node.python, "-c", "import click, pydantic, yaml; print(pydantic.VERSION)"]).stdout
            assert shown.strip() == importlib.metadata.version("pydantic")
            assert host.run(["test", "-e", ".cache"], check=False).returncode
        again = pair.up()
        assert again is not None
        assert not again.changed
        assert all(outcome.complete for outcome in pair.down(purge=True))
        pair.assert_still(before)
    finally:
        for host in pair.lab.hosts:
            host.run(["rm", "-f", "/usr/local/bin/python3"], "root")


def test_garbage_in_place_of_facts_is_cut_off(pair: Pair) -> None:
    before = pair.digests()
    path = "/usr/local/bin/python3"
    pair.head.write(path, "#!/bin/sh\nhead -c 10000000 /dev/urandom\n", user="root", mode=0o755)
    try:
        with pytest.raises(FailedError, match=f"{pair.head.name}: .*more than 8 MiB"):
            pair.up()
    finally:
        pair.head.run(["rm", path], "root")
    pair.assert_still(before)


def test_packets_that_do_not_pass_undo_it_all(pair: Pair) -> None:
    before = pair.digests()

    def block(node: str, said: str) -> None:
        if node == "":
            drop = "add table ip t; add chain ip t c { type filter hook input priority 0; }; add rule ip t c ip length > 8000 drop"
            pair.peer.run(["nft", drop], "root")

    try:
        with pytest.raises(FailedError, match="packets of 9000 bytes are lost and small ones pass") as told:
            pair.up(Answers(on=block))
    finally:
        pair.peer.run(["nft", "delete", "table", "ip", "t"], "root")
    assert "what this run had changed is undone" in told.value.fix
    pair.assert_still(before)


def test_what_announces_itself_and_is_a_spark_makes_an_inventory(pair: Pair, tmp_path: Path) -> None:
    reached = [transport.to(node) for node in pair.inventory().nodes]
    heard = {one.host: one for one in discover.announced(reached[0]) if str(one.address).startswith("198.18.")}
    assert f"{pair.peer.name}.local" in heard
    nodes = [discover.node_of(one, "spark") for one in sorted(heard.values(), key=lambda one: one.host)]
    found = discover.sparks(nodes, [transport.to(node) for node in nodes], lambda unknown: False)
    path = tmp_path / "inventory.yaml"
    path.write_text(discover.inventory_text(found))
    written = inventory.load(path)
    assert [(node.name, node.host, node.user) for node in written.nodes] == [
        (host.name, host.address, "spark") for host in pair.lab.hosts
    ]


def test_networkd_has_its_own_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(network="networkd", bind=[sys.prefix]) as lab:
        pair = Pair(settled(lab))
        pair.live_at(monkeypatch)
        before = pair.digests()
        assert pair.up() is not None
        assert b"renderer: networkd" in pair.head.read("/etc/netplan/40-cx7.yaml")
        again = pair.up()
        assert again is not None
        assert not again.changed
        assert all(outcome.complete for outcome in pair.down())
        pair.assert_still(before)


def test_the_pair_stays_over_networkmanagers_second_thoughts_and_a_reboot(
    kept: tuple[Lab, list[set[str]], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, before, made = kept
    pair = Pair(lab)
    pair.live_at(monkeypatch)
    time.sleep(max(0.0, made + KEPT_FOR - time.monotonic()))
    assert [len(addresses(host)) for host in lab.hosts] == [2, 2]
    pair.peer.reboot()
    eventually(lambda: len(addresses(pair.peer)) == 2, 20, "addresses after the boot")
    again = pair.up()
    assert again is not None
    assert not again.changed
    assert all(outcome.complete for outcome in pair.down())
    pair.assert_still(before)
