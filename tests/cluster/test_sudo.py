"""Root on a node, as an ordinary user gets it: without a password, with one, with a wrong one; what is root's in the journal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.changes import FileChange, LinesChange, Planned
from cluster.errors import FailedError
from cluster.transaction import Host, Transaction, look, undo
from cluster.transport.hostkeys import KnownHosts
from cluster.transport.ssh import SshTransport
from cluster.transport.sudo import Sudo, SudoError, WrongPasswordError
from tests.lab import Host as Box
from tests.lab import Lab

LACK = Lab.missing()
pytestmark = [pytest.mark.skipif(LACK is not None, reason=str(LACK)), pytest.mark.timeout(60)]

REPO = Path(__file__).parents[2]
PASSWORD = 'it\'s "mine" $(id)'
HOME = "/home/spark of ours"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(init="simple", home=HOME, bind=[sys.prefix, REPO]) as lab:
        yield lab


@pytest.fixture(autouse=True)
def ordinary(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts as they were at first."""
    monkeypatch.setenv("HOME", str(lab.home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    for box in lab.hosts:
        box.sudo_password(None)
        box.run(["rm", "-rf", "/run/sudo/ts/spark", "/var/lib/sudo/ts/spark"], "root")


@pytest.fixture
def nodes(lab: Lab) -> Iterator[tuple[SshTransport, SshTransport]]:
    one, two = (
        SshTransport(box.name, box.address, user="spark", known_hosts=KnownHosts(lab.known_hosts)) for box in lab.hosts
    )
    with one, two:
        yield one, two


class Asked:
    """Answers what sudo asks, and remembers for which node it was asked."""

    def __init__(self, *answers: str | None) -> None:
        self.answers = list(answers)
        self.nodes: list[str] = []

    def __call__(self, node: str) -> str | None:
        self.nodes.append(node)
        return self.answers.pop(0)


SCRIPT = ["sh", "-c", "id -u; cat; echo warning >&2"]


def test_without_a_password_nobody_is_asked(nodes: tuple[SshTransport, SshTransport]) -> None:
    result = nodes[0].run(SCRIPT, stdin=b"\0data\n", sudo=Sudo(Asked()))
    assert (result.stdout, result.stderr, result.status) == (b"0\n\0data\n", b"warning\n", 0)
    assert nodes[0].run(["sh", "-c", "exit 3"], sudo=Sudo()).status == 3
    with pytest.raises(FailedError, match="no-such-program"):
        nodes[0].run(["no-such-program"], sudo=Sudo())


def test_a_password_is_asked_for_once_for_both_nodes_and_reaches_sudo_only(
    lab: Lab, nodes: tuple[SshTransport, SshTransport]
) -> None:
    for box in lab.hosts:
        box.sudo_password(PASSWORD)
    asked = Asked(PASSWORD)
    sudo = Sudo(asked)
    look_around = [
        "sh",
        "-c",
        "cat; tr '\\0' ' ' < /proc/$PPID/cmdline; cat /proc/*/cmdline /proc/*/environ | tr '\\0' ' '; id -u",
    ]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda node: node.run(look_around, stdin=b"input\n", sudo=sudo), nodes))
    assert len(asked.nodes) == 1
    for result in results:
        assert result.stdout.startswith(b"input\n") and result.stdout.split()[-1] == b"0"
        assert b"mine" not in result.stdout and b"mine" not in result.stderr
    assert nodes[0].run(SCRIPT, stdin=b"again", sudo=sudo).stdout == b"0\nagain"
    assert len(asked.nodes) == 1
    assert "mine" not in repr(sudo) + str(vars(nodes[0]))


def test_a_password_that_sudo_does_not_want_does_not_reach_the_command(
    lab: Lab, nodes: tuple[SshTransport, SshTransport]
) -> None:
    lab.hosts[0].sudo_password(PASSWORD)
    sudo = Sudo(Asked(PASSWORD))
    assert nodes[0].run(SCRIPT, stdin=b"x", sudo=sudo).stdout == b"0\nx"
    lab.hosts[0].sudo_password(None)
    assert nodes[0].run(SCRIPT, stdin=b"x", sudo=sudo).stdout == b"0\nx"


def test_a_wrong_password_is_told_apart_and_asked_for_anew(lab: Lab, nodes: tuple[SshTransport, SshTransport]) -> None:
    lab.hosts[0].sudo_password(PASSWORD)
    asked = Asked("wrong one", PASSWORD)
    sudo = Sudo(asked)
    with pytest.raises(WrongPasswordError) as caught:
        nodes[0].run(SCRIPT, stdin=b"secret input", sudo=sudo)
    assert "wrong one" not in caught.value.message + caught.value.fix
    assert nodes[0].run(SCRIPT, stdin=b"x", sudo=sudo).stdout == b"0\nx"


def test_with_nobody_to_ask_or_no_right_to_use_sudo_it_says_so(
    lab: Lab, nodes: tuple[SshTransport, SshTransport]
) -> None:
    lab.hosts[0].sudo_password(PASSWORD)
    for sudo in (Sudo(), Sudo(Asked(None))):
        with pytest.raises(SudoError, match="wants a password, and there is nobody to ask"):
            nodes[0].run(SCRIPT, sudo=sudo)
    lab.hosts[0].write("/etc/sudoers.d/spark", "", user="root", mode=0o440)
    with pytest.raises(SudoError, match="sudo: "):
        nodes[0].run(SCRIPT, sudo=Sudo(Asked(PASSWORD)))


def test_roots_command_is_ended_at_its_time_out_and_so_is_the_users(
    lab: Lab, nodes: tuple[SshTransport, SshTransport]
) -> None:
    box, node = lab.hosts[0], nodes[0]
    for sudo in (None, Sudo()):
        with pytest.raises(FailedError, match="not done in time"):
            node.run(["sleep", "77"], timeout=0.3, sudo=sudo)
        end = time.monotonic() + 5
        while _runs(box, "sleep 77"):
            assert time.monotonic() < end
            time.sleep(0.05)


def _runs(box: Box, command: str) -> bool:
    return any(" ".join(process.argv) == command for process in box.processes())


def test_it_is_the_same_on_the_machine_itself(lab: Lab) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from cluster.transport.local import LocalTransport
from cluster.transport.sudo import Sudo, WrongPasswordError
node, words = LocalTransport("here"), ["wrong", {PASSWORD!r}]
sudo = Sudo(lambda name: words.pop(0))
try: node.run({SCRIPT!r}, sudo=sudo)
except WrongPasswordError as error: print(error.message)
print(node.run({SCRIPT!r}, stdin=b"x", sudo=sudo), node.run(["id", "-u"]).stdout)
"""
    lab.hosts[0].sudo_password(PASSWORD)
    done = lab.hosts[0].run([sys.executable, "-c", script])
    told, result = done.stdout.splitlines()
    assert told == "here: sudo did not accept the password"
    assert "status=0, stdout=b'0\\nx', stderr=b'warning\\n') b'1" in result


NETPLAN = FileChange("/etc/netplan/40-cx7.yaml", b"network:\n  version: 2\n", mode=0o600, root=True)
OWNED = FileChange("/etc/made for/spark", b"", owner="spark", root=True)
MINE = LinesChange("~/.ssh/authorized_keys", ('from="192.168.100.1" ssh-ed25519 AAAA',), "pair")


def test_roots_files_are_changed_and_restored_and_known_again_without_root(
    lab: Lab, nodes: tuple[SshTransport, SshTransport]
) -> None:
    box = lab.hosts[0]
    box.write("/etc/netplan/40-cx7.yaml", "# secret of root's\n", user="root", mode=0o600)
    digest = ["sh", "-c", "cd / && stat -c '%n %a %u:%g %Y' etc/netplan/* \"$1\"/.ssh/* && cat etc/netplan/*", "", HOME]
    before = box.run(digest, "root").stdout
    plain, host = Host(nodes[0]), Host(nodes[0], Sudo())
    assert [(plan.done, plan.state.known) for plan in look(plain, (NETPLAN, MINE)).planned] == [
        (False, False),
        (False, True),
    ]
    planned = look(host, (NETPLAN, MINE, OWNED)).planned
    assert "-# secret of root's" in planned[0].describe()
    with Transaction([host]) as transaction:
        transaction.apply({host.name: planned})
        transaction.commit()
    shown = box.run(["stat", "-c", "%a %U", NETPLAN.path, OWNED.path, "/etc/made for"]).stdout.splitlines()
    assert shown == ["600 root", "644 spark", "755 root"]
    assert [plan.done for plan in look(plain, (NETPLAN, MINE)).planned] == [
        True,
        True,
    ]  # so that a second `up` asks for nothing
    journal = f"{HOME}/.sparkctl/journal"
    assert box.run(["cat", f"{journal}/0001.before"], check=False).returncode == 1  # what only root might read

    (outcome,) = undo([plain])
    assert [left.reason for left in outcome.failed] == [
        f"{box.name}: write {OWNED.path} (mode 644, owner spark): only root can undo it",
        f"{box.name}: write {NETPLAN.path} (mode 600, owner root): only root can undo it",
    ]
    (outcome,) = undo([host])
    assert outcome.complete
    assert box.run(digest, "root").stdout == before
    assert box.run(["test", "-e", "/etc/made for"], check=False).returncode == 1


def test_root_does_nothing_that_the_user_has_written_into_the_journal(
    lab: Lab, nodes: tuple[SshTransport, SshTransport]
) -> None:
    box, host = lab.hosts[1], Host(nodes[1], Sudo())
    with Transaction([host]) as transaction:
        transaction.apply({host.name: [Planned(NETPLAN, look(host, (NETPLAN,)).planned[0].state)]})
        transaction.commit()
    entry = f"{HOME}/.sparkctl/journal/0001.json"
    forged = json.loads(box.run(["cat", entry]).stdout)
    forged["paths"], forged["left"] = ["/etc/shadow"], [""]
    box.run(["rm", "-f", entry])
    box.write(entry, json.dumps(forged))
    (outcome,) = undo([host], force=True)
    assert not outcome.complete and "says that it is root's, and is not" in outcome.failed[0].reason
    box.run(["test", "-e", "/etc/shadow"], "root")
