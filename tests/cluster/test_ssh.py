"""The transport over SSH, against a real sshd, and what it makes of hosts that are not as they should be."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import FailedError, RefusedError
from cluster.transport import Transport
from cluster.transport.hostkeys import ChangedHostKeyError, KnownHosts, UnknownHostKeyError, parse
from cluster.transport.local import LocalTransport
from cluster.transport.ssh import CHANNELS, SshTransport
from tests.cluster.sshd import MISSING, Sshd, make_key

pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.timeout(30)]

AWKWARD = ["a b", "$(touch x)", "`id`", "'\"\\", "*", "a\nb", "-n", "", "\u00e9;|&<>~!#"]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sshd"), options="MaxSessions 6") as server:
        yield server


@pytest.fixture(autouse=True)
def home(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client's home, with known_hosts as it was at first."""
    monkeypatch.setenv("HOME", str(sshd.home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    sshd.known_hosts.write_text(sshd.known_line())
    (sshd.home / ".ssh" / "config").unlink(missing_ok=True)
    return sshd.home


@pytest.fixture
def node(sshd: Sshd) -> Iterator[SshTransport]:
    with to(sshd) as transport:
        yield transport


@pytest.fixture(params=["ssh", "local"])
def either(request: pytest.FixtureRequest, sshd: Sshd) -> Iterator[Transport]:
    with to(sshd) if request.param == "ssh" else LocalTransport("here") as transport:
        yield transport


def to(sshd: Sshd, **options: object) -> SshTransport:
    return SshTransport("spark-a", "127.0.0.1", port=sshd.port, **options)  # type: ignore[arg-type]


def eventually(true: Callable[[], object], timeout: float = 5) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, "never"
        time.sleep(0.02)


def ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def listening(answer: bytes = b"", *, again: bool = False) -> Iterator[int]:
    """A port where something accepts connections and says `answer`, perhaps again and again, and no more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with contextlib.suppress(OSError):
                        connection.sendall(answer)
                        while again:
                            connection.sendall(answer)
                    open_ones.append(connection)

        open_ones: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


# Commands


def test_arguments_reach_the_command_as_they_are(either: Transport) -> None:
    script = "import sys; sys.stdout.write('\\0'.join(sys.argv[1:])); sys.stderr.write('e'); sys.exit(7)"
    result = either.run([sys.executable, "-c", script, *AWKWARD])
    assert result.stdout.decode().split("\0") == AWKWARD
    assert (result.status, result.stderr, result.argv[0]) == (7, b"e", sys.executable)


def test_input_of_any_size_reaches_a_command_that_reads_it_and_one_that_does_not(either: Transport) -> None:
    data = secrets.token_bytes(5_000_000)
    assert either.run(["cat"], stdin=data, timeout=20).stdout == data
    assert either.run(["true"], stdin=data, timeout=20).status == 0


def test_a_command_is_ended_at_its_time_out(either: Transport, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(FailedError, match="sh: not done in time"):
        either.run(["sh", "-c", 'echo $$ > "$0"; sleep 60', str(tmp_path / "pid")], timeout=0.5)
    assert time.monotonic() - started < 3
    pid = int((tmp_path / "pid").read_text())
    eventually(lambda: ended(pid))


def test_endless_output_is_cut_off(either: Transport) -> None:
    with pytest.raises(FailedError, match="printed more than 8 MiB"):
        either.run(["yes"], timeout=20)
    with pytest.raises(FailedError, match="printed more than 1 MiB"):
        either.run(["sh", "-c", "yes >&2"], timeout=20, limit=1 << 20)
    assert either.run(["true"]).status == 0


def test_a_program_that_is_not_there_is_told_from_one_that_fails(either: Transport) -> None:
    with pytest.raises(FailedError, match="no-such-program: "):
        either.run(["no-such-program"])
    assert either.run(["sh", "-c", "exit 127"]).status == 127
    assert either.run(["sh", "-c", "kill -9 $$"]).status < 0


def test_a_session_answers_orders_amid_noise_and_says_how_it_ended(either: Transport) -> None:
    script = (
        "import sys\nfor line in sys.stdin:\n print('noise'); print('so \\x1e' + line.strip()[::-1], flush=True)\n"
        " if 'end' in line: sys.exit('that was it')"
    )
    session = either.session([sys.executable, "-c", script])
    session.nudge()
    assert session.ask(b"abc", timeout=10) in (b"cba", b"")  # the empty line of the nudge is answered here too
    session.ask(b"end", timeout=10)
    with pytest.raises(FailedError, match="ended without an answer: that was it"):
        for _ in range(2):
            session.ask(b"more", timeout=10)
    assert session.closed
    session.close()


# Files


def test_a_file_is_put_as_a_whole_with_its_mode_under_any_name(either: Transport, tmp_path: Path) -> None:
    path = tmp_path / " a'b\"$(touch x)\n;\u00e9"
    data = bytes(range(256)) * 40
    either.put(str(path), b"old", mode=0o644)
    either.put(str(path), data, mode=0o640)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (data, 0o640)
    assert list(tmp_path.iterdir()) == [path]


def test_a_large_file_goes_and_comes(node: SshTransport, tmp_path: Path) -> None:
    data = secrets.token_bytes(20_000_000)
    node.put(str(tmp_path / "large"), data)
    assert node.get(str(tmp_path / "large")) == data


def test_a_file_is_got_from_an_offset_and_by_length(either: Transport, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789\n\x1e\xff")
    assert either.get(str(path), offset=4) == b"456789\n\x1e\xff"
    assert either.get(str(path), offset=2, length=3) == b"234"
    assert either.get(str(path), offset=99) == b""


def test_files_that_cannot_be_had_are_named_with_the_reason(either: Transport, tmp_path: Path) -> None:
    for fails in (
        lambda: either.get(str(tmp_path / "none")),
        lambda: either.put(str(tmp_path / "none" / "f"), b""),
        lambda: either.start(["true"], log=str(tmp_path / "none" / "log")),
    ):
        with pytest.raises(FailedError, match=rf"{tmp_path}/none.*No such file or directory"):
            fails()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sshd(tmp_path, disk=1) as small:
        monkeypatch.setenv("HOME", str(small.home))
        with to(small) as node:
            node.put(f"{small.disk}/f", b"old")
            with pytest.raises(FailedError, match="No space left on device"):
                node.put(f"{small.disk}/f", b"x" * (2 << 20))
            assert node.run(["ls", "-A", str(small.disk)]).stdout == b"f\n"
            assert node.get(f"{small.disk}/f") == b"old"


def test_what_a_login_shell_prints_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = tmp_path / "noise"
    noise.write_text("echo Welcome; seq 1000; echo warning >&2\n")
    with Sshd(tmp_path / "sshd", environment={"BASH_ENV": str(noise), "SPARKCTL_HOME": "/x y/$z"}) as noisy:
        monkeypatch.setenv("HOME", str(noisy.home))
        with to(noisy) as node:
            if b"Welcome" not in node.run(["true"]).stdout:
                pytest.skip("the login shell here is not bash")
            node.put(str(tmp_path / "f"), b"data")
            assert node.get(str(tmp_path / "f")) == b"data"
            assert node.home().sparkctl == "/x y/$z"
            assert Path(node.home().user).is_dir()


def test_ten_megabytes_of_garbage_instead_of_an_answer_are_refused(sshd: Sshd, tmp_path: Path) -> None:
    liar = tmp_path / "python"
    liar.write_text("#!/bin/sh\nhead -c 10000000 /dev/urandom\n")
    liar.chmod(0o755)
    with to(sshd, python=str(liar)) as node, pytest.raises(FailedError, match="printed more than 8 MiB"):
        node.home()
    liar.write_text("#!/bin/sh\nprintf '\\036[1]\\n'; echo no >&2\n")
    with to(sshd, python=str(liar)) as node, pytest.raises(FailedError, match="did not answer: no"):
        node.home()


# Programs that stay, ports


def test_what_is_started_outlives_client_connection_and_sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    with Sshd(tmp_path / "sshd") as server:
        monkeypatch.setenv("HOME", str(server.home))
        node = to(server)
        script = 'echo "$A"; env | wc -l; sleep 0.3; echo late; sleep 60'
        pid = node.start(["/bin/sh", "-c", script], log=str(log), env={"A": "x; y"})
        try:
            server.stop()
            node.close()
            eventually(lambda: "late" in log.read_text())
            lines = log.read_text().split("\n")
            assert lines[:2] == ["before", "x; y"] and int(lines[2]) < 5  # the shell adds a few of its own
            assert os.getsid(pid) == pid
        finally:
            os.killpg(pid, signal.SIGKILL)
    with pytest.raises(FailedError, match="no-such-program"):
        LocalTransport("here").start(["no-such-program"], log=str(log))


def test_a_forwarded_port_takes_connections_when_forward_returns(node: SshTransport) -> None:
    with listening(b"hello") as port:
        near = node.forward(port)
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", near), 5) as connection:
                assert connection.recv(5) == b"hello"
    with socket.create_connection(("127.0.0.1", near), 5) as connection:
        assert connection.recv(1) == b""  # nobody is there any more
    with listening(b"again") as port, socket.create_connection(("127.0.0.1", node.forward(port)), 5) as connection:
        assert connection.recv(5) == b"again"
    node.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", near), 5)


def test_a_forwarded_connection_carries_both_ways_after_one_side_has_said_all(node: SshTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(("127.0.0.1", node.forward(listener.getsockname()[1])), 5)
        far, _ = listener.accept()
        with near, far:
            near.sendall(b"question")
            near.shutdown(socket.SHUT_WR)
            assert b"".join(iter(lambda: far.recv(99), b"")) == b"question"
            far.sendall(b"x" * 300_000)
            far.shutdown(socket.SHUT_WR)
            assert len(b"".join(iter(lambda: near.recv(99_999), b""))) == 300_000


def test_many_commands_share_one_connection_and_few_channels(sshd: Sshd) -> None:
    # sshd itself refuses a seventh session.
    logins = sshd.connections()
    with to(sshd) as node, ThreadPoolExecutor(20) as pool:
        assert {r.status for r in pool.map(lambda _: node.run(["sleep", "0.05"]), range(20))} == {0}
        assert sshd.connections() == logins + 1
        sessions = [node.session(["cat"]) for _ in range(CHANNELS)]
        waiting = pool.submit(node.run, ["true"])
        time.sleep(0.1)
        assert not waiting.done()
        for session in sessions:
            session.close()
        assert waiting.result().status == 0


def test_an_sshd_that_allows_fewer_sessions_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sshd(tmp_path, options="MaxSessions 1") as strict:
        monkeypatch.setenv("HOME", str(strict.home))
        with to(strict) as node, node.session(["cat"]), pytest.raises(FailedError) as caught:
            node.run(["true"])
    assert "refuses another session" in caught.value.message and "MaxSessions" in caught.value.fix


# Host keys


def test_an_unknown_host_is_refused_until_its_key_is_accepted(sshd: Sshd) -> None:
    sshd.known_hosts.unlink()
    node = to(sshd)
    with node, pytest.raises(UnknownHostKeyError) as caught:
        node.run(["true"])
    shown = subprocess.run(["ssh-keygen", "-lf", sshd.host_key], check=True, capture_output=True, text=True).stdout
    key = caught.value.key
    assert (key.fingerprint, key.type) == (shown.split()[1], "ssh-ed25519")
    assert isinstance(caught.value, RefusedError) and key.fingerprint in caught.value.message

    for _ in range(2):
        KnownHosts().accept(key)
    assert sshd.known_hosts.read_text() == sshd.known_line()
    assert sshd.known_hosts.stat().st_mode & 0o777 == 0o600
    with node:
        assert node.run(["true"]).status == 0


def test_accepting_adds_a_line_of_its_own_and_leaves_the_others(sshd: Sshd) -> None:
    sshd.known_hosts.write_text("other ssh-ed25519 AAAA")  # no newline at its end
    with to(sshd) as node:
        with pytest.raises(UnknownHostKeyError) as caught:
            node.run(["true"])
        KnownHosts().accept(caught.value.key)
        assert sshd.known_hosts.read_text() == "other ssh-ed25519 AAAA\n" + sshd.known_line()
        assert node.run(["true"]).status == 0


def test_a_changed_key_is_refused_with_both_fingerprints(sshd: Sshd, tmp_path: Path) -> None:
    make_key(tmp_path / "old")
    sshd.known_hosts.write_text(sshd.known_line(tmp_path / "old"))
    with to(sshd) as node, pytest.raises(ChangedHostKeyError) as caught:
        node.run(["true"])
    assert len(set(re.findall(r"SHA256:[A-Za-z0-9+/]{43}", caught.value.message))) == 2
    assert "ssh-keygen -R" in caught.value.fix
    assert caught.value.status == 3
    # An unknown type of key for a known host is a change too: it is what a man in the middle would offer.
    make_key(tmp_path / "rsa", kind="ecdsa")
    sshd.known_hosts.write_text(sshd.known_line(tmp_path / "rsa"))
    with to(sshd) as node, pytest.raises(ChangedHostKeyError):
        node.run(["true"])


def test_a_revoked_key_is_refused(sshd: Sshd) -> None:
    sshd.known_hosts.write_text(
        sshd.known_line() + "@revoked " + sshd.known_line().replace("[127.0.0.1]", "[127.0.0.*]")
    )
    with to(sshd) as node, pytest.raises(ChangedHostKeyError, match="revoked"):
        node.run(["true"])


def test_hashed_entries_are_known(sshd: Sshd) -> None:
    subprocess.run(["ssh-keygen", "-H", "-f", sshd.known_hosts], check=True, capture_output=True)
    assert "127.0.0.1" not in sshd.known_hosts.read_text()
    with to(sshd) as node:
        assert node.run(["true"]).status == 0


def test_the_systems_known_hosts_count_beside_the_users(sshd: Sshd, tmp_path: Path) -> None:
    system = tmp_path / "ssh_known_hosts"
    system.write_text(f"@cert-authority * {sshd.known_line().split(' ', 1)[1]}garbage\n# note\n{sshd.known_line()}")
    make_key(tmp_path / "other")  # a host may have two keys of a type
    sshd.known_hosts.write_text(sshd.known_line(tmp_path / "other"))
    with to(sshd, known_hosts=KnownHosts(system=(system,))) as node:
        assert node.run(["true"]).status == 0


def test_the_key_that_is_known_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_key(tmp_path / "rsa", kind="rsa")
    with Sshd(tmp_path / "sshd", options=f"HostKey {tmp_path}/rsa") as two_keys:
        two_keys.known_hosts.write_text(two_keys.known_line(tmp_path / "rsa"))
        monkeypatch.setenv("HOME", str(two_keys.home))
        with to(two_keys) as node:
            assert node.run(["true"]).status == 0


@pytest.mark.parametrize(
    ("patterns", "known"),
    [
        ("spark-a", True),
        ("SPARK-A", True),
        ("other,spark-a", True),
        ("spark-?", True),
        ("*,!spark-a", False),
        ("spark", False),
        ("[spark-a]:2222", False),
        ("|1|broken|=", False),
    ],
)
def test_patterns_of_known_hosts(patterns: str, known: bool) -> None:
    assert bool(parse(f"{patterns} ssh-ed25519 AAAA comment\n", "spark-a").keys) is known


# Logging in


def test_a_key_that_is_not_authorised_is_named(sshd: Sshd, tmp_path: Path) -> None:
    for kind in ("ed25519", "rsa"):
        make_key(tmp_path / kind, kind=kind)
        sshd.authorized_keys.rename(tmp_path / "aside")
        try:
            with to(sshd, identity_file=str(tmp_path / kind)) as node, pytest.raises(FailedError) as caught:
                node.run(["true"])
        finally:
            (tmp_path / "aside").rename(sshd.authorized_keys)
        assert "not let in" in caught.value.message
        assert str(tmp_path / kind) in caught.value.message and "id_ed25519" in caught.value.message
        assert "ssh-copy-id" in caught.value.fix


def test_no_key_a_locked_key_and_a_missing_key_are_told_apart(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "known_hosts").write_text(sshd.known_line())
    monkeypatch.setenv("HOME", str(tmp_path))
    with to(sshd) as node, pytest.raises(FailedError, match="no key here, and no agent"):
        node.run(["true"])
    with to(sshd, identity_file="~/none") as node, pytest.raises(FailedError, match=f"{tmp_path}/none: no such key"):
        node.run(["true"])
    for kind in ("ed25519", "rsa"):
        make_key(tmp_path / kind, kind=kind, passphrase="secret")
        locked = rf"{tmp_path}/{kind} \(locked by a passphrase: ssh-add it\)"
        with to(sshd, identity_file=f"~/{kind}") as node, pytest.raises(FailedError, match=locked):
            node.run(["true"])


def test_an_identity_file_may_begin_with_a_tilde(sshd: Sshd) -> None:
    (sshd.home / ".ssh" / "id_ed25519").rename(sshd.home / "own key")
    try:
        with to(sshd, identity_file="~/own key") as node:
            assert node.run(["true"]).status == 0
    finally:
        (sshd.home / "own key").rename(sshd.home / ".ssh" / "id_ed25519")


def test_the_agents_keys_are_used_and_the_agent_is_never_forwarded(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "known_hosts").write_text(sshd.known_line())
    (tmp_path / ".ssh" / "config").write_text("Host *\n  ForwardAgent yes\n  ConnectTimeout 3\n")
    sock = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", sock], stdout=subprocess.DEVNULL)
    try:
        eventually(sock.exists)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(sock))
        monkeypatch.setenv("HOME", str(tmp_path))
        subprocess.run(["ssh-add", "-q", sshd.home / ".ssh" / "id_ed25519"], check=True, capture_output=True)
        with to(sshd) as node:
            assert node.run(["printenv", "SSH_AUTH_SOCK"]).status == 1
    finally:
        agent.kill()
        agent.wait()


def test_the_users_ssh_config_gives_names_users_and_jumps(sshd: Sshd, home: Path) -> None:
    (home / ".ssh" / "config").write_text(
        f"Host jump\n  HostName 127.0.0.1\n  Port {sshd.port}\nHost spark\n  HostName 127.0.0.1\n  Port {sshd.port}\n"
        "  ProxyJump jump\n"
    )
    logins = sshd.connections()
    with SshTransport("spark-a", "spark") as node:
        assert node.run(["echo", "there"]).stdout == b"there\n"
    assert sshd.connections() == logins + 2
    sshd.known_hosts.unlink()  # a host to jump through is verified as any other
    with SshTransport("spark-a", "spark") as node, pytest.raises(UnknownHostKeyError):
        node.run(["true"])


def test_hosts_and_users_with_metacharacters_are_never_read_by_a_shell(sshd: Sshd, home: Path, tmp_path: Path) -> None:
    (home / ".ssh" / "config").write_text(f'Match exec "touch {tmp_path}/matched; echo %h"\n  User root\n')
    mark = tmp_path / "mark"
    for host in (f"x;touch {mark}", f"$(touch {mark})", "-oProxyCommand=x", "a b", "user@host", ""):
        with SshTransport("spark-a", host) as node, pytest.raises(FailedError, match="no host name"):
            node.run(["true"])
    (home / ".ssh" / "config").unlink()
    with to(sshd, user=f"x;touch {mark}") as node, pytest.raises(FailedError, match="not let in"):
        node.run(["true"])
    assert list(tmp_path.iterdir()) == []


# Hosts that are not there, or not right


def test_each_way_of_not_being_there_is_told_apart(sshd: Sshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with SshTransport("spark-a", "127.0.0.1", port=port) as node, pytest.raises(FailedError, match="refused"):
        node.run(["true"])
    with SshTransport("spark-a", "no-such-host.invalid") as node, pytest.raises(FailedError, match="no such host name"):
        node.run(["true"])


@pytest.mark.parametrize(
    ("answer", "again", "told"),
    [
        (b"", False, "does not answer as an SSH server"),
        (b"HTTP/1.1 400 \x1b[2J Bad\r\n" * 200, False, "does not answer as an SSH server"),
        (b"x" * 65536, True, "does not answer as an SSH server"),
        (b"SSH-2.0-Silent\r\n", False, "does not answer as an SSH server"),
        (b"SSH-2.0-Garbage\r\n" + b"\xff" * 100_000, False, "does not answer as an SSH server"),
        (b"SSH-1.5-Old\r\n", False, "Incompatible version"),
    ],
    ids=["nothing", "another protocol", "endless garbage", "only a banner", "garbage after it", "an old version"],
)
def test_what_is_no_ssh_server_is_left_soon(
    answer: bytes, again: bool, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    with listening(answer, again=again) as port:
        node = SshTransport("spark-a", "127.0.0.1", port=port, patience=0.5)
        with node, pytest.raises(FailedError, match=told) as caught:
            node.run(["true"])
    assert time.monotonic() - started < 4
    assert caught.value.message.isprintable() and len(caught.value.message) < 250
    assert capfd.readouterr().err == ""


def test_a_host_that_hangs_is_given_up_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sshd(tmp_path) as server:
        monkeypatch.setenv("HOME", str(server.home))
        with to(server, patience=0.5) as node:
            node.run(["true"])
            frozen = server.freeze()
            try:
                started = time.monotonic()
                with pytest.raises(FailedError, match=r"does not answer as an SSH server within 0\.5 s"):
                    node.run(["true"])
                assert time.monotonic() - started < 4
            finally:
                for pid in frozen:
                    os.kill(pid, signal.SIGCONT)
            assert node.run(["true"]).status == 0


def test_a_lost_connection_ends_what_ran_on_it_and_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sshd(tmp_path) as server, ThreadPoolExecutor() as pool:
        monkeypatch.setenv("HOME", str(server.home))
        with to(server) as node:
            running = pool.submit(node.run, ["sleep", "5"])
            session = node.session(["cat"])
            eventually(lambda: server.log().count("Starting session") == 2)
            server.stop()
            with pytest.raises(FailedError, match="connection was lost"):
                running.result()
            with pytest.raises(FailedError, match="connection was lost"):
                session.ask(b"anybody?", timeout=10)
            server.start()
            assert node.run(["true"]).status == 0


def test_a_dead_host_is_noticed_by_the_kernel(sshd: Sshd) -> None:
    from cluster.transport import dial

    connection = dial.dial(dial.Address("spark-a", "127.0.0.1", port=sshd.port), KnownHosts(), 8.0)
    try:
        sock = connection.transport.sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 8000
    finally:
        dial.hang_up(connection)


def test_nothing_heavy_is_loaded_before_a_node_is_reached() -> None:
    script = (
        "import sys, cluster.transport.local, cluster.transport.ssh, cluster.transaction\n"
        "heavy = {'fabric', 'paramiko', 'invoke', 'cryptography', 'pydantic'} & set(sys.modules)\nsys.exit(str(heavy or ''))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).stderr.strip() == b""
