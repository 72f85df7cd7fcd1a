"""Changes to hosts: shown, made on both or on none, journaled before they are made, undone byte for byte."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.changes import (
    Books,
    Change,
    CommandChange,
    Damaged,
    Entry,
    FileChange,
    LinesChange,
    MakeChange,
    Planned,
    SettingChange,
    State,
    TreeChange,
    Undone,
    decode,
    diff,
    encode,
)
from cluster.clerk import MODULES
from cluster.errors import FailedError, RefusedError
from cluster.transaction import Host, Transaction, look, undo
from cluster.transport import shipped
from cluster.transport.local import LocalTransport
from cluster.transport.ssh import SshTransport
from tests.cluster.sshd import MISSING, Sshd
from tests.cluster.tarball import tarball
from tests.cluster.tree import snapshot

pytestmark = pytest.mark.timeout(60)
with_sshd = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

ME = f"{os.environ.get('USER', 'root')}"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is a place for that: all that is changed is synced to disk, time and again."""
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        yield Path(folder)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """This machine, with a home folder and a $SPARKCTL_HOME of its own."""
    (tmp_path / "home").mkdir()
    (tmp_path / "etc").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "ours"))
    return Host(LocalTransport("here"))


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Host, Host]]:
    """Two hosts over SSH. What they change lies in tmp_path/a and tmp_path/b."""
    with ExitStack() as stack:
        hosts = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            home = {"SPARKCTL_HOME": str(tmp_path / f"ours of {name}")}
            sshd = stack.enter_context(Sshd(tmp_path / f"sshd-{name}", environment=home))
            key, known = tmp_path / f"sshd-{name}/home/.ssh/id_ed25519", tmp_path / "known_hosts"
            with known.open("a") as file:
                file.write(sshd.known_line())
            hosts.append((name, sshd.port, key))
        (tmp_path / ".ssh").mkdir()
        known.rename(tmp_path / ".ssh" / "known_hosts")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        nodes = [
            stack.enter_context(SshTransport(name, "127.0.0.1", port=port, identity_file=str(key)))
            for name, port, key in hosts
        ]
        yield Host(nodes[0]), Host(nodes[1])


def make(host: Host, *changes: Change) -> None:
    """What `up` does, on one host."""
    with Transaction([host]) as transaction:
        transaction.apply({host.name: look(host, changes).planned})
        transaction.commit()


def kinds(folder: Path) -> tuple[Change, ...]:
    """One of each, for a host whose files lie in `folder`."""
    flag = folder / "flag"
    copied = ("sh", "-c", 'cat "$0" > "$1" || true', str(folder / "etc/new/file"), str(folder / "flag2"))
    return (
        SettingChange("MTU of enp1s0f0np0", str(folder / "mtu"), "9000", root=False),
        FileChange(str(folder / "etc/40-cx7.yaml"), b"network:\n  version: 2\n", mode=0o600),
        FileChange(str(folder / "etc/new/file"), b"\0\xff", reload=(copied,)),
        LinesChange(str(folder / "etc/hosts"), ("192.168.100.2 spark-b",), "link"),
        CommandChange("linger", ("touch", str(flag)), ("rm", str(flag)), ("ls", str(flag)), str(flag)),
        MakeChange(
            "make a key",
            (f"{folder}/ssh/id", f"{folder}/ssh/id.pub"),
            ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/ssh/id"),
        ),
        TreeChange(f"{folder}/code/abc", tarball({"cluster/x.py": b"x = 1\n", "bin/run": b"#!/bin/sh\n"})),
    )


def furnish(folder: Path) -> dict[str, tuple[object, ...]]:
    """The host's files before, with what a file may have that must not get lost."""
    (folder / "etc").mkdir(exist_ok=True)
    (folder / "mtu").write_text("1500\n")
    (folder / "flag2").write_bytes(b"")
    (folder / "etc/40-cx7.yaml").write_bytes(b"# mine\r\nno newline at the end")
    (folder / "etc/40-cx7.yaml").chmod(0o640)
    (folder / "etc/hosts").write_text("127.0.0.1 localhost")
    if os.geteuid() == 0:
        os.chown(folder / "etc/hosts", 12345, 54321)
    os.utime(folder / "etc/hosts", ns=(1, 2_000_000_000_123_456_789))
    return outside(folder)


def outside(folder: Path) -> dict[str, tuple[object, ...]]:
    """A snapshot without sparkctl's own folder, and without the times of what is written in place."""
    seen = {path: kept for path, kept in snapshot(folder).items() if not path.startswith(f"{folder}/ours")}
    return {path: kept[:3] if path.endswith(("/mtu", "/flag2")) else kept for path, kept in seen.items()}


# Data


def test_every_kind_of_change_survives_its_way_to_the_host_and_into_the_journal(tmp_path: Path) -> None:
    state = State(False, b"\0", mode=0o600, uid=1, gid=2, mtime=3)
    for change in kinds(tmp_path):
        entry = Entry(1, "run", "me", "now", False, change, state, ("/p",), (), ("d",), 5)
        books = Books((entry, Damaged(2, "torn")), None)
        assert decode(json.loads(json.dumps(encode(books)))) == books
    for nonsense in (
        {"type": "os.system"},
        {"no": "type"},
        {"type": "State"},
        {"base64": "!"},
        {"type": "Undone", "x": 1},
    ):
        with pytest.raises((ValueError, TypeError)):
            decode(nonsense)


@pytest.mark.parametrize("text", [b"", b"one\n", b"one", b"one\n\n# sparkctl: begin other\nx\n# sparkctl: end other\n"])
def test_lines_are_added_once_replaced_in_place_and_cut_out_again(text: bytes) -> None:
    change = LinesChange("/etc/hosts", ("a", "b"), "link")
    added = change.wanted(text)
    assert added.startswith(text) and b"# sparkctl: begin link\na\nb\n# sparkctl: end link\n" in added
    assert change.wanted(added) == added
    newer = dataclasses.replace(change, lines=("c",))
    replaced = newer.wanted(added + b"more\n")
    assert b"\na\n" not in replaced and replaced.endswith(b"more\n") and replaced.count(b"begin link") == 1
    assert change.remainder(added + b"more\n", text, force=False) == (text + b"\n" * (text == b"one") + b"more\n")
    assert newer.remainder(replaced, added, force=False) == added + b"more\n"
    assert change.remainder(replaced, text, force=False) is None
    assert change.block(b"# sparkctl: begin link\nnever ended\n") == b""


def test_a_plan_shows_what_would_be_different(tmp_path: Path) -> None:
    before = State(False, b"a\nb\n", mode=0o644)
    shown = Planned(
        FileChange("/etc/f", b"a\nc\n", mode=0o600, root=True, reload=(("netplan", "apply"),)), before
    ).describe()
    assert shown.splitlines() == [
        "write /etc/f (mode 600, owner root), then `netplan apply` (as root)",
        *("mode 644 -> 600", "@@ -1,2 +1,2 @@", " a", "-b", "+c"),
    ]
    assert Planned(SettingChange("MTU of x", "/sys/x", "9000"), State(False, b"1500\n")).describe().splitlines() == [
        "set the MTU of x to 9000 (as root)",
        *("-1500", "+9000"),
    ]
    command = CommandChange("let it linger", ("loginctl", "enable-linger", "a b"), (), ("true",), "")
    assert Planned(command, State(False)).describe().splitlines() == ["let it linger", "$ loginctl enable-linger 'a b'"]
    assert Planned(FileChange("/f", b"x\n"), State(True, b"x\n")).describe() == "write /f (mode 644)"
    assert "only be read by root" in Planned(FileChange("/f", b"x", root=True), State(False, known=False)).describe()
    assert diff(b"\xff", b"abc") == ["1 bytes -> 3 bytes"]


# One host


def test_all_of_it_is_made_and_undone_to_the_byte(host: Host, tmp_path: Path) -> None:
    before = furnish(tmp_path)
    changes = kinds(tmp_path)
    assert [plan.done for plan in look(host, changes).planned] == [False] * 7
    assert outside(tmp_path) == before and not (tmp_path / "ours").exists()  # looking changes nothing

    make(host, *changes)
    assert (tmp_path / "mtu").read_text() == "9000"
    assert (tmp_path / "etc/40-cx7.yaml").read_bytes() == b"network:\n  version: 2\n"
    assert (tmp_path / "etc/40-cx7.yaml").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "flag2").read_bytes() == b"\0\xff"
    assert (tmp_path / "etc/hosts").read_text().splitlines()[2] == "192.168.100.2 spark-b"
    assert os.access(tmp_path / "code/abc/bin/run", os.X_OK) and (tmp_path / "ssh/id").exists()
    assert (tmp_path / "ours/journal").stat().st_mode & 0o777 == 0o700

    (done,) = undo([host])
    assert done.complete and len(done.undone) == 7
    assert outside(tmp_path) == before
    assert undo([host])[0].undone == ()


def test_a_file_is_tried_beside_its_neighbours_before_it_is_written(host: Host, tmp_path: Path) -> None:
    before = furnish(tmp_path)
    (tmp_path / "etc/90-mine.yaml").write_text("mine\n")
    path, seen = tmp_path / "etc/40-cx7.yaml", tmp_path / "seen"

    def wish(text: bytes) -> FileChange:
        trial = ("sh", "-c", 'cat "$0"/*.yaml > "$1"; grep -L bad "$0"/*', f"{{root}}{tmp_path}/etc", str(seen))
        return FileChange(str(path), text, mode=0o600, trial=(*trial[:2], f"{trial[2]} | grep -q 40-cx7", *trial[3:]))

    with pytest.raises(FailedError, match=r"40-cx7\.yaml is not written: "):
        make(host, wish(b"bad\n"))
    assert seen.read_text() == "bad\nmine\n"
    seen.unlink()
    (tmp_path / "etc/90-mine.yaml").unlink()
    assert outside(tmp_path) == before
    make(host, wish(b"good\n"))
    assert path.read_bytes() == b"good\n"


def test_a_second_time_there_is_nothing_to_do(host: Host, tmp_path: Path) -> None:
    furnish(tmp_path)
    make(host, *kinds(tmp_path))
    ours = snapshot(tmp_path)
    planned = look(host, kinds(tmp_path)).planned
    assert all(plan.done for plan in planned)
    with Transaction([host]) as transaction:
        transaction.apply({"here": planned})
        transaction.commit()
    now = snapshot(tmp_path)
    assert {path for path in now if now[path] != ours.get(path)} <= {str(tmp_path / "ours/journal/lock")}


def test_a_transaction_that_is_not_committed_leaves_nothing(host: Host, tmp_path: Path) -> None:
    before = furnish(tmp_path)
    with Transaction([host]) as transaction:
        transaction.apply({"here": transaction.look("here", kinds(tmp_path)).planned})
        assert outside(tmp_path) != before
    assert outside(tmp_path) == before
    with pytest.raises(KeyboardInterrupt), Transaction([host]) as transaction:
        transaction.apply({"here": transaction.look("here", kinds(tmp_path)).planned})
        raise KeyboardInterrupt
    assert outside(tmp_path) == before
    assert look(host, ()).books == Books()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            FileChange("{}/f", b"x", reload=(("sh", "-c", "test -e {}/f && echo broken >&2 && exit 3; exit 0"),)),
            "exit status 3: broken",
        ),
        (FileChange("{}/etc/hosts/below", b"x"), "Not a directory"),
        (FileChange("relative", b"x"), "not an absolute path"),
        (CommandChange("idle", ("true",), ("true",), ("false",), ""), "had no effect"),
        (CommandChange("slow", ("sleep", "30"), ("true",), ("false",), "", timeout=0.2), "not done after 0.2 s"),
        (MakeChange("idle", ("{}/made/it",), ("true",)), "did not make {}/made/it"),
        (MakeChange("there", ("{}/etc/hosts", "{}/x"), ("true",)), "{}/etc/hosts: is there already"),
        (SettingChange("absent", "{}/etc/none/x", "1", root=False), "{}/etc/none/x: there is no such setting"),
        (TreeChange("{}/tree", tarball({"../evil": b"x"})), "../evil: has no place"),
        (TreeChange("{}/tree", tarball({"/etc/evil": b"x"})), "/etc/evil: has no place"),
        (TreeChange("{}/tree", b"no archive"), "ReadError"),
    ],
)
def test_a_change_that_fails_says_why_and_takes_the_others_back(
    change: Change, told: str, host: Host, tmp_path: Path
) -> None:
    before = furnish(tmp_path)
    here = decode(json.loads(json.dumps(encode(change)).replace("{}", str(tmp_path))))
    with pytest.raises(FailedError) as caught, Transaction([host]) as transaction:
        first = LinesChange(str(tmp_path / "etc/hosts2"), ("a",), "link")
        transaction.apply({"here": transaction.look("here", (first, here)).planned})
    assert told.format(tmp_path) in caught.value.message
    assert outside(tmp_path) == before
    assert look(host, ()).books == Books()


def test_a_reload_that_cannot_be_run_is_given_up_when_forced(host: Host, tmp_path: Path) -> None:
    before = outside(tmp_path)
    with pytest.raises(FailedError, match="no-such-program: No such file") as caught:
        make(host, FileChange(str(tmp_path / "etc/f"), b"", reload=(("no-such-program",),)))
    assert "not undone: here: write" in caught.value.fix
    assert outside(tmp_path) == before
    assert undo([host])[0].failed
    assert undo([host], force=True)[0].complete


def test_what_has_changed_since_it_was_planned_is_not_touched(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "etc/f"
    file.write_text("old")
    planned = look(host, [FileChange(str(file), b"new")]).planned
    file.write_text("somebody else's")
    with pytest.raises(FailedError, match="has changed since this was planned"), Transaction([host]) as transaction:
        transaction.apply({"here": planned})
    assert file.read_text() == "somebody else's"


def test_a_file_that_somebody_changed_since_is_left_alone_unless_forced(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "etc/f"
    file.write_text("old\n")
    make(host, FileChange(str(file), b"ours\n"), LinesChange(str(tmp_path / "etc/hosts"), ("a",), "link"))
    file.write_text("theirs\n")
    with (tmp_path / "etc/hosts").open("a") as hosts:
        hosts.write("their host\n")

    for _ in range(2):
        (outcome,) = undo([host])
        (left,) = outcome.left
        assert (left.title, left.reason) == (f"write {file} (mode 644)", f"{file} has been changed since")
        assert left.diff == ("@@ -1 +1 @@", "-ours", "+theirs")
        assert file.read_text() == "theirs\n"
        assert (tmp_path / "etc/hosts").read_text() == "their host\n"  # only our lines are gone
    (outcome,) = undo([host], force=True)
    assert outcome.complete and file.read_text() == "old\n"


def test_lines_and_files_that_somebody_removed_stay_removed(host: Host, tmp_path: Path) -> None:
    hosts, file, key = tmp_path / "etc/hosts", tmp_path / "etc/f", tmp_path / "key"
    hosts.write_text("one\n")
    file.write_text("old")
    made = MakeChange("make", (str(key),), ("touch", str(key)))
    make(host, LinesChange(str(hosts), ("a",), "link"), FileChange(str(file), b"ours"), made)
    hosts.write_text("one\ntwo\n")
    file.unlink()
    key.write_text("a key of their own")
    (outcome,) = undo([host])
    assert hosts.read_text() == "one\ntwo\n"
    assert {left.reason for left in outcome.left} == {f"{file} has been removed since", f"{key} has been changed since"}
    assert not file.exists() and key.exists()
    (outcome,) = undo([host], force=True)
    assert outcome.complete and file.read_text() == "old" and not key.exists()


def test_changed_lines_of_ours_are_left_and_forced_out(host: Host, tmp_path: Path) -> None:
    hosts = tmp_path / "etc/hosts"
    hosts.write_text("one\n")
    make(host, LinesChange(str(hosts), ("a",), "link"))
    hosts.write_text(hosts.read_text().replace("a\n", "b\n") + "two\n")
    assert undo([host])[0].left
    assert undo([host], force=True)[0].complete
    assert hosts.read_text() == "one\ntwo\n"


def test_several_changes_to_one_file_are_undone_in_reverse(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "etc/f"
    file.write_text("first")
    before = outside(tmp_path)
    for text in (b"second", b"third"):
        make(host, FileChange(str(file), text, mode=0o600))
    make(host, FileChange(str(file), b"third", mode=0o640))
    make(host, FileChange("~/../etc/f", b"fourth"))
    undo([host])
    assert outside(tmp_path) == before


def test_a_link_stays_a_link(host: Host, tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    (tmp_path / "dotfiles/keys").write_text("one\n")
    (tmp_path / "home/.ssh").mkdir()
    (tmp_path / "home/.ssh/authorized_keys").symlink_to(tmp_path / "dotfiles/keys")
    before = outside(tmp_path)
    make(host, LinesChange("~/.ssh/authorized_keys", ("a key",), "pair"))
    assert (tmp_path / "home/.ssh/authorized_keys").is_symlink()
    assert "a key" in (tmp_path / "dotfiles/keys").read_text()
    undo([host])
    assert outside(tmp_path) == before


def test_what_lies_in_sparkctls_own_folder_stays_for_the_next_time(host: Host, tmp_path: Path) -> None:
    code = TreeChange("$SPARKCTL_HOME/code/abc", tarball({"x.py": b""}))
    with Transaction([host]) as transaction:
        transaction.apply({"here": transaction.look("here", (code,)).planned})
    assert not (tmp_path / "ours/code").exists()
    make(host, code)
    assert undo([host])[0].undone == ()
    assert look(host, (code,)).planned[0].done


def test_a_setting_that_a_reboot_or_somebody_changed_is_known(host: Host, tmp_path: Path) -> None:
    mtu = tmp_path / "mtu"
    for now, left in (("1500\n", ()), ("4000\n", (f"{mtu} has been changed since",)), (None, ())):
        mtu.write_text("1500\n")
        make(host, SettingChange("MTU", str(mtu), "9000", root=False))
        mtu.unlink()
        if now:
            mtu.write_text(now)
        (outcome,) = undo([host])
        assert tuple(leftover.reason for leftover in outcome.left) == left
        undo([host], force=True)


def test_a_damaged_entry_does_not_keep_the_others_from_being_undone(host: Host, tmp_path: Path) -> None:
    before = outside(tmp_path)
    for name in ("a", "b", "c"):
        make(host, FileChange(str(tmp_path / "etc" / name), b""))
    (tmp_path / "ours/journal/0002.json").write_text('{"type": "Ent')
    (outcome,) = undo([host])
    assert [left.title for left in outcome.failed] == ["entry 2 of the journal"]
    assert set(outside(tmp_path)) - set(before) == {str(tmp_path / "etc/b")}
    make(host, FileChange(str(tmp_path / "etc/b"), b"again"))  # nor from being made


# Power cuts, rivals, full disks


def test_a_power_cut_at_any_point_is_mended(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.cluster.crash", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert "apply" in done.stdout


RIVAL = """
import sys, time
from cluster.changes import FileChange
from cluster.transaction import Host, Transaction, look
from cluster.transport.local import LocalTransport
host = Host(LocalTransport("here"))
with Transaction([host]) as transaction:
    change = FileChange(sys.argv[1], b"theirs", reload=(("sh", "-c", "sleep " + sys.argv[2]),))
    print("locked", flush=True)
    transaction.apply({"here": look(host, [change]).planned})
    print("changed", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def rival(host: Host, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Another command line that holds the lock and has made a change, or is at it."""
    argv = [sys.executable, "-c", RIVAL, str(tmp_path / "etc/f"), request.param]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout
        process.stdout.readline()
        if request.param == "0":
            process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.parametrize("rival", ["0"], indirect=True)
def test_who_holds_the_lock_is_told_and_it_dies_with_them(
    rival: subprocess.Popen[str], host: Host, tmp_path: Path
) -> None:
    for refused in (lambda: make(host, FileChange(str(tmp_path / "etc/g"), b"")), lambda: undo([host])):
        with pytest.raises(RefusedError) as caught:
            refused()
        assert "@" in caught.value.message and "is changing it since 20" in caught.value.message
    assert (tmp_path / "etc/f").read_text() == "theirs"
    assert look(host, ()).books.unfinished

    os.kill(rival.pid, signal.SIGKILL)
    rival.wait()
    said: list[str] = []
    end = time.monotonic() + 10
    while True:
        try:
            with Transaction([host], tell=lambda node, text: said.append(text)) as transaction:
                assert transaction.recovered == ("here",)
            break
        except RefusedError:  # its session is just ending
            assert time.monotonic() < end
            time.sleep(0.02)
    assert not (tmp_path / "etc/f").exists()
    assert (
        said[0].startswith("undo what the run of ")
        and said[1] == f"undo: write {tmp_path}/etc/f (mode 644), then `sh -c 'sleep 0'`"
    )


@pytest.mark.parametrize("rival", ["1"], indirect=True)
def test_a_client_that_dies_while_a_command_runs_keeps_the_lock_until_that_ends(
    rival: subprocess.Popen[str], host: Host, tmp_path: Path
) -> None:
    end = time.monotonic() + 10
    while not (tmp_path / "etc/f").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(rival.pid, signal.SIGKILL)
    with pytest.raises(RefusedError):
        undo([host])
    while True:
        try:
            (outcome,) = undo([host])
            break
        except RefusedError:
            assert time.monotonic() < end
            time.sleep(0.05)
    assert outcome.complete and not (tmp_path / "etc/f").exists()


def test_a_session_that_hears_nothing_ends_by_itself(host: Host) -> None:
    modules = shipped.modules(MODULES).replace(b"SILENCE = 30", b"SILENCE = 1")
    argv = shipped.argv(sys.executable)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.write(modules + b"[null, null]\n")
        process.stdin.flush()
        for _ in range(3):
            time.sleep(0.5)
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert process.poll() is None
        assert process.wait(10) == -signal.SIGALRM


@with_sshd
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("size", [1, 3])
def test_a_full_disk_leaves_nothing_half_done(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"SPARKCTL_HOME": str(tmp_path / "disk/ours")}
    with Sshd(tmp_path, environment=ours, disk=size) as sshd:
        monkeypatch.setenv("HOME", str(sshd.home))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        disk = str(sshd.disk)
        with SshTransport("spark-a", "127.0.0.1", port=sshd.port) as node:
            node.put(f"{disk}/f", b"old")
            if size == 1:
                node.put(f"{disk}/fill", bytes(900 << 10))
            host = Host(node)
            changes = (
                FileChange(f"{disk}/f", b"new"),
                MakeChange("fill", (f"{disk}/big",), ("sh", "-c", 'head -c 4M /dev/zero > "$0"', f"{disk}/big")),
            )
            with pytest.raises(FailedError, match="No space left on device"):
                make(host, *changes)
            names = node.run(["find", disk, "-type", "f", "-not", "-name", "lock", "-printf", "%f\n"]).stdout.split()
            assert sorted(names) == [b"f"] + [b"fill"] * (size == 1)
            assert node.get(f"{disk}/f") == b"old"


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("", "ended without an answer"),
        ("no", "ended without an answer"),
        ("\x1e{", "makes no sense"),
        ("\x1e[1]", "makes no sense"),
        ('\x1e["done", {"type": "State"}]', "makes no sense"),
        ('\x1e["done", ["/", "/"]]\n\x1e["done", [[], 3]]', "makes no sense"),
        ('\x1e["done", ["/", "/"]]\n\x1e["failed", "\\u001b[2Jx", 28]', r"here:  \[2Jx"),
    ],
)
def test_a_host_that_answers_nonsense_is_told(says: str, told: str, tmp_path: Path) -> None:
    liar = tmp_path / "python"
    liar.write_text("#!/bin/sh\ncat <<'E'\n" + says + "\nE\n")
    liar.chmod(0o755)
    with pytest.raises(FailedError, match=told) as caught:
        look(Host(LocalTransport("here", python=str(liar))), ())
    assert caught.value.message.isprintable()


# Two hosts


@with_sshd
def test_both_hosts_are_changed_or_neither(pair: tuple[Host, Host], tmp_path: Path) -> None:
    before = {name: furnish(tmp_path / name) for name in ("a", "b")}
    said: list[tuple[str, str]] = []
    good, bad = (
        kinds(tmp_path / "a"),
        (
            *kinds(tmp_path / "b"),
            FileChange(str(tmp_path / "b/x"), b"", reload=(("sh", "-c", 'test ! -e "$0"', str(tmp_path / "b/x")),)),
        ),
    )
    with (
        pytest.raises(FailedError, match=r"^b: `sh .*`: exit status 1") as caught,
        Transaction(pair, tell=lambda node, text: said.append((node, text))) as transaction,
    ):
        transaction.apply({"a": transaction.look("a", good).planned, "b": transaction.look("b", bad).planned})
    assert caught.value.fix.endswith("(what this run had changed is undone)")
    assert {name: outside(tmp_path / name) for name in ("a", "b")} == before
    assert {node for node, text in said if text.startswith("undo: ")} == {"a", "b"}

    with Transaction(pair) as transaction:
        transaction.apply({"a": transaction.look("a", good).planned, "b": transaction.look("b", bad[:-1]).planned})
        transaction.commit()
    assert all(outcome.complete for outcome in undo(pair))
    assert {name: outside(tmp_path / name) for name in ("a", "b")} == before


@with_sshd
def test_what_could_not_be_rolled_back_is_told_and_mended_by_down(pair: tuple[Host, Host], tmp_path: Path) -> None:
    flag = tmp_path / "a/flag"
    stubborn = CommandChange("linger", ("touch", str(flag)), ("false",), ("ls", str(flag)), str(flag))
    with pytest.raises(FailedError) as caught, Transaction(pair) as transaction:
        transaction.apply({"a": transaction.look("a", (stubborn,)).planned})
        transaction.apply({"b": transaction.look("b", (FileChange(str(tmp_path / "b/f/g"), b""),)).planned})
        raise FailedError("the link is dead", "mend it")
    assert caught.value.message == "the link is dead"
    assert caught.value.fix == "not undone: a: linger: a: `false`: exit status 1; `sparkctl down` tries again"
    with pytest.raises(FailedError, match=r"a run of .* was interrupted at .* and cannot be undone"), Transaction(pair):
        pass
    flag.unlink()
    assert all(outcome.complete for outcome in undo(pair))
    with Transaction(pair) as transaction:
        assert transaction.recovered == ()


@with_sshd
def test_a_host_that_is_away_does_not_keep_the_other_from_being_undone(pair: tuple[Host, Host], tmp_path: Path) -> None:
    with Transaction(pair) as transaction:
        for name in ("a", "b"):
            change = FileChange(str(tmp_path / name / "f"), b"")
            transaction.apply({name: transaction.look(name, (change,)).planned})
        transaction.commit()
    with SshTransport("b", "127.0.0.1", port=1) as gone:
        first, second = undo([pair[0], Host(gone)])
        with pytest.raises(FailedError, match=r"b: .*refused"), Transaction([pair[0], Host(gone)]):
            pass
    assert first.complete and not (tmp_path / "a/f").exists()
    assert not second.complete and second.error and "refused" in second.error.message
    assert all(outcome.complete for outcome in undo(pair))
    assert not (tmp_path / "b/f").exists()


@with_sshd
def test_a_connection_lost_on_the_way_is_made_anew_to_undo(pair: tuple[Host, Host], tmp_path: Path) -> None:
    with pytest.raises(FailedError, match="connection was lost") as caught, Transaction(pair) as transaction:
        change = FileChange(str(tmp_path / "a/f"), b"x")
        transaction.apply({"a": transaction.look("a", (change,)).planned})
        pair[0].transport.close()
        transaction.apply({"a": transaction.look("a", (change,)).planned})
    assert "is undone" in caught.value.fix
    assert not (tmp_path / "a/f").exists()


def test_undone_says_by_itself_what_it_came_to() -> None:
    assert Undone(True) == decode(encode(Undone(True)))
