"""`up`, `down` and `status` as a person, or a program, runs them: what they print, and their exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.code import own
from tests.lab import Lab, eventually
from tests.terminal import Terminal

pytestmark = pytest.mark.timeout(1200)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if missing := Lab.missing():
        (pytest.skip if os.geteuid() else pytest.fail)(missing)
    with Lab(bind=[sys.prefix]) as lab:
        for host in lab.hosts:
            eventually(lambda host=host: "default" in host.run(["ip", "-4", "route"]).stdout, 20, "the default route")
        python = f"python: {sys.prefix}/bin/python, identity_file"
        lab.inventory_file.write_text(
            lab.inventory().replace("identity_file", python) + "env: {HELLO: you, MY_TOKEN: x1y2}\n"
        )
        yield lab


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code as it is now: an edit while these tests run would be another version, which `up` ships anew."""
    folder = tmp_path_factory.mktemp("code")
    for path, content in own().files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def run(lab: Lab, code: Path) -> Run:
    """Run `sparkctl` on the lab, in the laptop user's home and without a terminal."""
    return lambda *words: sparkctl(code, lab.home, *words, "-i", str(lab.inventory_file))


@pytest.fixture
def on_terminal(lab: Lab, code: Path) -> Callable[..., Terminal]:
    """The same, before a person."""

    def start(*words: str) -> Terminal:
        argv = [sys.executable, "-m", "sparkctl", *words, "-i", str(lab.inventory_file)]
        return Terminal(argv, cwd=lab.home, env=environment(code, lab.home))

    return start


def environment(code: Path, home: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(code), "TERM": "xterm", "COLUMNS": "200"}


def sparkctl(code: Path, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparkctl", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
        cwd=home,
        env=environment(code, home),
        check=False,
    )


def test_a_pair_is_shown_made_looked_at_and_undone(run: Run, lab: Lab) -> None:
    shown = run("up", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    head, peer = lab.hosts
    assert (
        f"rail 0: spark-a {head.rails[0]} 192.168.100.10/24 <-> spark-b {peer.rails[0]} 192.168.100.11/24, MTU 9000"
        in shown.stdout
    )
    assert "      +      addresses: [192.168.101.11/24]" in shown.stdout
    assert "paired" not in shown.stdout

    refused = run("up", "-q")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: without a terminal `up` needs --yes")

    made = run("up", "--yes", "--json")
    assert made.returncode == 0, made.stderr
    document = json.loads(made.stdout)
    assert document["changed"] is True
    assert document["pair"]["link"]["verdict"] == "unverified", "TCP proves the path, not the bar"
    assert document["pair"]["link"]["gbps"] > 0
    collective = json.loads(document["pair"]["link"]["measurement"])["collective"]
    assert collective["error"] == ""
    assert collective["carried"] >= collective["moved"] > 0, "the ranks' bytes went by the rails"

    again = run("up")
    assert again.returncode == 0, again.stderr
    assert "paired already, nothing changed; addresses and full-size packets ok" in again.stdout

    looked = run("status")
    assert looked.returncode == 0, looked.stderr
    assert "200 Gbit/s + 200 Gbit/s" in looked.stdout
    status = json.loads(run("status", "--json").stdout)
    assert [node["addresses"] for node in status["nodes"]] == [
        ["192.168.100.10/24", "192.168.101.10/24"],
        ["192.168.100.11/24", "192.168.101.11/24"],
    ]
    environment = run("status", "--env").stdout
    assert f"GLOO_SOCKET_IFNAME={','.join(head.rails)}" in environment
    assert "HELLO=you" in environment
    assert "x1y2" not in environment

    again = run("bench", "link", "--seconds", "0.3")
    assert again.returncode == 0, again.stderr
    assert "TCP" in again.stdout
    assert "all-reduce, gloo" in again.stdout
    assert "unknown bandwidth: " in again.stdout

    gone = run("down", "--purge")
    assert gone.returncode == 0, gone.stderr
    assert gone.stdout.endswith("spark-a and spark-b: as they were before `up`\n")
    assert "not paired from here" in run("status").stdout
    refused = run("bench", "link")
    assert refused.returncode == 3
    assert "not paired from here" in refused.stderr


def test_an_unknown_host_key_is_refused_without_a_terminal(run: Run, lab: Lab) -> None:
    known = lab.known_hosts.read_text()
    lab.known_hosts.write_text("")
    try:
        refused = run("up", "--yes")
        assert refused.returncode == 3
        assert "the host key of" in refused.stderr
        assert "SHA256:" in refused.stderr
        accepted = run("up", "--dry-run", "--accept-new-host-keys")
        assert accepted.returncode == 0, accepted.stderr
        assert accepted.stderr.count("new host key accepted") == 2
    finally:
        lab.known_hosts.write_text(known)


PASSWORD = "correct horse battery"


def test_a_person_is_asked_for_host_keys_consent_and_one_password(
    run: Run, on_terminal: Callable[..., Terminal], lab: Lab
) -> None:
    before = lab.known_hosts.read_text()
    known = sorted(before.splitlines())
    lab.known_hosts.write_text("")
    for host in lab.hosts:
        host.sudo_password(PASSWORD)
    try:
        with on_terminal("up") as wary:
            wary.expect("SHA256:")
            wary.expect(r"Is this key the node's\? \[y/N\]: ")
            wary.type("n")
            assert wary.ended() == 3
        assert lab.known_hosts.read_text() == ""

        with on_terminal("up") as undecided:
            for _ in lab.hosts:
                undecided.expect(r"Is this key the node's\? \[y/N\]: ")
                undecided.type("y")
            undecided.expect("password for sudo on ")  # netplan's files are root's to read
            undecided.type(PASSWORD)
            undecided.expect(r"write /etc/netplan/40-cx7\.yaml")
            undecided.expect(r"Do this\? \[y/N\]: ")
            undecided.type("n")
            assert undecided.ended() == 130
        assert sorted(lab.known_hosts.read_text().splitlines()) == known
        assert lab.hosts[0].run(["test", "-e", "/etc/netplan/40-cx7.yaml"], check=False).returncode

        with on_terminal("up") as wrong:
            wrong.expect(r"password for sudo on spark-\w \(and the other node\): ")
            wrong.type("wrong")
            wrong.expect("sudo did not accept the password")
            assert wrong.ended() == 1

        with on_terminal("up") as made:
            made.expect("password for sudo on ")
            made.type(PASSWORD)
            made.expect(r"Do this\? \[y/N\]: ")
            made.type("y")
            made.expect("spark-a and spark-b: paired; addresses and full-size packets ok")
            assert made.ended() == 0
        assert made.shown.count("password for sudo") == 1
        assert PASSWORD not in made.shown

        refused = run("down")
        assert refused.returncode == 1
        assert "sudo wants a password, and there is nobody to ask" in refused.stderr
        with on_terminal("down") as undone:
            undone.expect("password for sudo on ")
            undone.type(PASSWORD)
            undone.expect("as they were before `up`")
            assert undone.ended() == 0
    finally:
        for host in lab.hosts:
            host.sudo_password(None)
        lab.known_hosts.write_text(before)


def test_doctor_examines_both_and_writes_a_bundle_without_identities(run: Run, lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    done = run("doctor", "--json", "--bundle", str(path))
    assert done.returncode in (0, 1), done.stderr
    findings = json.loads(done.stdout)
    assert {"ok", "unknown"} <= {finding["level"] for finding in findings}
    with tarfile.open(path) as archive:
        names = archive.getnames()
        texts = "".join(file.read().decode() for name in names if (file := archive.extractfile(name)))
    expected = {"findings.json", "facts-node-0.json", "facts-node-1.json"}
    assert {f"sparkctl-bundle/{name}" for name in expected} <= set(names)
    machine = lab.hosts[0].read("/etc/machine-id").decode().strip()
    mac = lab.hosts[0].read(f"/sys/class/net/{lab.hosts[0].rails[0]}/address").decode().strip()
    assert machine not in texts
    assert mac not in texts
    for private in ("spark-a", "spark-b", lab.hosts[0].home):
        assert private not in texts


def test_a_node_that_is_off_is_told_and_the_other_shown(run: Run, lab: Lab) -> None:
    lab.hosts[1].sshd(False)
    try:
        looked = run("status", "--json")
        assert looked.returncode == 1
        head, peer = json.loads(looked.stdout)["nodes"]
        assert head["memory_total"] > 0
        assert "refused" in peer["error"]
    finally:
        lab.hosts[1].sshd(True)


@pytest.mark.parametrize(("verb", "told"), [("up", "nothing to do"), ("down", "nothing to undo")])
def test_an_embedded_pair_needs_nothing(verb: str, told: str, code: Path, tmp_path: Path) -> None:
    done = sparkctl(code, tmp_path, verb)
    assert done.returncode == 0
    assert done.stdout == f"embedded pair: {told}, its two ranks run on this machine\n"


def test_status_of_an_embedded_pair_shows_this_machine(code: Path, tmp_path: Path) -> None:
    done = sparkctl(code, tmp_path, "status", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["embedded"] is True
    assert [node["name"] for node in document["nodes"]] == ["left"]
