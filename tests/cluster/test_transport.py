"""The transport to this machine: what every transport promises, kept by local processes and files."""

from __future__ import annotations

import os
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster.errors import FailedError
from cluster.transport import Transport
from cluster.transport.local import LocalTransport
from tests.commandline import gone, wait_for


@pytest.fixture
def node() -> Transport:
    return LocalTransport("left")


def test_a_command_gives_back_what_it_printed_and_how_it_ended(node: Transport) -> None:
    script = "import sys; print(sys.stdin.read().upper()); print('oh', file=sys.stderr); sys.exit(3)"
    done = node.run([sys.executable, "-c", script], stdin=b"hello")
    assert (done.status, done.stdout, done.stderr) == (3, b"HELLO\n", b"oh\n")
    assert done.argv == (sys.executable, "-c", script)


def test_no_shell_reads_an_argument(node: Transport) -> None:
    words = ["$HOME", "a b", "*", "; false", "'", '"']
    done = node.run([sys.executable, "-c", "import sys; print(sys.argv[1:])", *words])
    assert done.stdout.decode().strip() == str(words)


def test_a_program_that_is_not_there_is_told(node: Transport) -> None:
    with pytest.raises(FailedError, match=r"^left: /no/such: No such file or directory$"):
        node.run(["/no/such"])
    with pytest.raises(FailedError, match=r"^left: /no/such: No such file or directory$"):
        node.start(["/no/such"], log=os.devnull)


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(node: Transport, tmp_path: Path) -> None:
    # The child keeps the pipes open: to wait for their end would be to wait for the child.
    script = (
        "import subprocess, sys, time; from pathlib import Path\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "Path(sys.argv[1]).write_text(str(child.pid)); time.sleep(60)"
    )
    began = time.monotonic()
    with pytest.raises(FailedError, match=rf"^left: {sys.executable}: not done in time$"):
        node.run([sys.executable, "-c", script, str(tmp_path / "child")], timeout=2)
    assert time.monotonic() - began < 20
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: gone(child), 10)


def test_a_file_comes_back_as_it_was_put_from_any_offset(node: Transport, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    data = bytes(range(256)) * 1000
    node.put(path, data)
    assert node.get(path) == data
    assert node.get(path, offset=255_990) == data[-10:]
    assert node.get(path, offset=len(data) + 5) == b""
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    node.put(path, b"short", mode=0o755)
    assert node.get(path) == b"short"
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o755


def test_a_file_that_cannot_be_read_or_written_is_told(node: Transport, tmp_path: Path) -> None:
    with pytest.raises(FailedError, match=r"^left: .*/absent: No such file or directory$"):
        node.get(str(tmp_path / "absent"))
    with pytest.raises(FailedError, match=r"^left: .*/absent/file: No such file or directory$"):
        node.put(str(tmp_path / "absent" / "file"), b"")


def test_what_is_started_goes_on_alone_with_its_environment_and_a_log(node: Transport, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "import os, sys, time\n"
        "print(os.environ['WORD'], os.getcwd(), os.getsid(0) == os.getpid(), repr(sys.stdin.read()), flush=True)\n"
        "print('oh', file=sys.stderr, flush=True); time.sleep(60)"
    )
    pid = node.start([sys.executable, "-c", script], log=str(log), env={"WORD": "hello"})
    try:
        wait_for(lambda: log.read_text().endswith("oh\n"), 30)
        assert log.read_text() == "hello / True ''\noh\n"
        assert not gone(pid)
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
    finally:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


def test_a_forwarded_port_is_the_nodes_own(node: Transport) -> None:
    assert node.forward(4711) == 4711
