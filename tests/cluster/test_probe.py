"""The probe tells what it sees, says why it does not see the rest, and never fails, hangs or changes anything."""

from __future__ import annotations

import ast
import json
import os
import socket
import stat
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from cluster import facts, probe
from cluster.facts import Unknown
from cluster.readings import answer
from tests.lab import eventually

PYTHON = sys.executable
SYSTEM = "/usr/local/bin:/usr/bin:/bin"


def ran(script: bytes, *, path: str = SYSTEM, cwd: Path | None = None, **environment: str) -> bytes:
    """What the probe prints, piped to an interpreter as it is on a node."""
    argv = [PYTHON, *probe.ARGV[1:]]
    done = subprocess.run(
        argv, input=script, capture_output=True, cwd=cwd, timeout=20, env={"PATH": path} | environment, check=False
    )
    assert done.stderr == b""
    assert done.returncode == 0
    return done.stdout


def seen(script: bytes, **environment: Any) -> dict[str, Any]:
    return json.loads(ran(script, **environment))["facts"]


def program(folder: Path, name: str, body: str) -> None:
    """An executable shell script."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def hurried(script: bytes) -> bytes:
    """The script with a quarter of a second for each command."""
    return script.replace(b"COMMAND_SECONDS = 4.0", b"COMMAND_SECONDS = 0.25")


def test_every_fact_is_answered_in_a_form_that_we_read(tmp_path: Path) -> None:
    raw = ran(probe.script(), HOME=str(tmp_path))
    assert set(json.loads(raw)["facts"]) == set(answer.Answers.model_fields)
    found = facts.parse(raw, "here")
    assert found.hostname == socket.gethostname()
    assert found.cores == os.cpu_count()
    memory = facts.known(found.memory, None)
    assert memory is not None
    assert memory.total > 1 << 28
    assert abs(found.time - time.time()) < 20


def test_it_runs_on_any_python_from_3_8_and_needs_nothing_else() -> None:
    tree = ast.parse(probe.script(), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not called & {"removeprefix", "removesuffix", "is_relative_to", "readlink_", "with_stem", "batched", "cache"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in ("shell", "strict")]


def test_it_changes_nothing(tmp_path: Path) -> None:
    ran(probe.script(), HOME=str(tmp_path), cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_box_without_any_tool_is_still_told_of(tmp_path: Path) -> None:
    # Not even /usr/bin: what the probe adds to the PATH itself is taken out.
    bare = probe.script().replace(b":/usr/local/sbin:/usr/sbin:/sbin:/bin", b"")
    found = seen(bare, path=str(tmp_path), HOME=str(tmp_path))
    assert found["gpu"] == {"unknown": "nvidia-smi: not installed"}
    assert found["routes"] == {"unknown": "ip: not installed"}
    assert found["sudo"] == ({"value": "passwordless"} if os.getuid() == 0 else {"value": None})
    assert found["networkmanager"] == {"value": None}
    assert "MemTotal" in found["meminfo"]["value"]


def test_what_is_not_there_is_null(tmp_path: Path) -> None:
    found = seen(probe.script(home=str(tmp_path / "none")), HOME=str(tmp_path))
    assert found["packages"] == {"value": None}
    assert found["ssh_folder"] == {"value": None}
    assert found["sparkctl"]["value"]["mode"] is None
    assert found["disks"]["value"][str(tmp_path / "none")]["value"]["total"] > 0  # what it would lie on


@pytest.mark.parametrize("then", ["wait", "exit 0"])  # the command hangs, or leaves a child that holds its output
def test_a_command_that_hangs_is_given_up_with_its_children(tmp_path: Path, then: str) -> None:
    body = f"echo $$ >> {tmp_path}/pids; sleep 600 & echo $! >> {tmp_path}/pids; {then}"
    program(tmp_path / "bin", "nvidia-smi", body)
    began = time.monotonic()
    found = seen(hurried(probe.script()), path=f"{tmp_path}/bin:{SYSTEM}", HOME=str(tmp_path))
    assert time.monotonic() - began < 60, "the command sleeps for 600 s"
    assert found["gpu"] == {"unknown": "nvidia-smi: not done after 0.25 s"}
    assert "value" in found["meminfo"]
    for pid in (tmp_path / "pids").read_text().split():
        eventually(lambda pid=pid: not _runs(int(pid)), what="the end of a killed process")


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_look_up_that_hangs_holds_up_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stuck")  # opening it blocks for ever, as a file of a dead NFS server does
    script = probe.script().replace(b"/etc/dgx-release", str(tmp_path / "stuck").encode())
    script = script.replace(b"ALL_SECONDS = 8.0", b"ALL_SECONDS = 2.0")
    found = seen(script, HOME=str(tmp_path))
    assert found["dgx_release"] == {"unknown": "not done after 2 s"}
    assert "value" in found["meminfo"]


def test_a_command_that_prints_without_end_is_cut(tmp_path: Path) -> None:
    program(tmp_path / "bin", "ibstat", "exec yes")
    found = seen(probe.script(), path=f"{tmp_path}/bin:{SYSTEM}", HOME=str(tmp_path))
    assert found["ibstat"] == {"unknown": f"ibstat: prints more than {1 << 20} bytes"}


def test_a_failing_command_is_quoted(tmp_path: Path) -> None:
    message = "Failed to initialize NVML: Driver/library version mismatch"
    program(tmp_path / "bin", "nvidia-smi", f"echo '{message}'; echo NVML library version: 580.126; exit 18")
    found = seen(probe.script(), path=f"{tmp_path}/bin:{SYSTEM}", HOME=str(tmp_path))
    assert found["gpu"] == {"unknown": f"nvidia-smi: exit status 18: {message}"}


def test_a_column_that_the_driver_does_not_know_costs_only_itself(tmp_path: Path) -> None:
    said = 'Field "clocks_event_reasons.active" is not a valid field to query.'
    refuse = f"case \"$1\" in *event_reasons*) echo '{said}'; exit 2;; esac"
    program(tmp_path / "bin", "nvidia-smi", f"{refuse}\necho name; echo NVIDIA GB10")
    found = seen(probe.script(), path=f"{tmp_path}/bin:{SYSTEM}", HOME=str(tmp_path))
    assert found["gpu"] == {"value": "name\nNVIDIA GB10\n"}


def test_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    program(tmp_path / "bin", "ibdev2netdev", r"printf 'roce\377\376 \000 x\n'")
    home = tmp_path / "home"
    (home / "code" / os.fsdecode(b"\xff\xfe\x1b[2J")).mkdir(parents=True)
    raw = ran(probe.script(home=str(home)), path=f"{tmp_path}/bin:{SYSTEM}", HOME=str(tmp_path))
    found = facts.parse(raw, "here")
    assert not isinstance(found.sparkctl, Unknown)
    assert found.sparkctl.code[0].isprintable()


def test_an_answer_that_grows_too_large_leaves_facts_out(tmp_path: Path) -> None:
    raw = ran(probe.script().replace(b"MOST_ANSWER = 3 << 20", b"MOST_ANSWER = 4000"), HOME=str(tmp_path))
    assert b"left out: the answer would be too large" in raw
    facts.parse(raw, "here")


@pytest.mark.parametrize(
    "name", ["a home", "$(touch owned)", "`touch owned`", "a';touch owned;'", '"""', "\\", "ü{}%s"]
)
def test_no_name_is_ever_run(tmp_path: Path, name: str) -> None:
    home = tmp_path / name / ".sparkctl"
    (home / "code" / "0123").mkdir(parents=True)
    script = probe.script(python_path=f"{tmp_path}/{name}/python", home=str(home), disks=[str(home)])
    found = seen(script, HOME=str(tmp_path / name), cwd=tmp_path)
    assert found["sparkctl"]["value"]["path"] == str(home)
    assert found["sparkctl"]["value"]["code"] == ["0123"]
    assert found["packages"] == {"value": None}
    assert not (tmp_path / "owned").exists()


def test_modules_in_the_folder_or_on_pythonpath_are_not_loaded(tmp_path: Path) -> None:
    for name in ("json", "subprocess", "sitecustomize", "usercustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nraise SystemExit('owned')\n")
    ran(probe.script(), cwd=tmp_path, HOME=str(tmp_path), PYTHONPATH=str(tmp_path))
    assert not (tmp_path / "owned").exists()


def test_who_listens_on_a_port_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        port = server.getsockname()[1]
        found = facts.parse(ran(probe.script(ports=[port]), HOME=str(tmp_path)), "here")
        assert other.getsockname()[1] != port
    (listener,) = facts.known(found.listeners, ())
    assert (str(listener.address), listener.port, listener.pid) == ("127.0.0.1", port, os.getpid())
    assert listener.command


def test_packages_are_known_without_being_imported(tmp_path: Path) -> None:
    script = probe.script(python_path=PYTHON).replace(
        b"print(json.dumps(", b"assert 'torch' not in sys.modules\nprint(json.dumps("
    )
    packages = facts.known(facts.parse(ran(script, HOME=str(tmp_path)), "here").packages, None)
    assert packages is not None
    assert packages.version_of("torch") == version("torch")
    assert packages.version == ".".join(map(str, sys.version_info[:3]))


def test_secrets_stay_on_the_node() -> None:
    text = (
        "network:\n  wifis:\n    wl0:\n      access-points:\n        home:\n          password: 'hunter2'\n"
        "        work:\n          auth:\n            password: |\n              hunter3\n              hunter4\n"
        "            identity: alice\n        cafe: {password: hunter5}\n        bar: {Password : hunter6}\n"
        "  tunnels:\n    wg0:\n      keys:\n        private: hunter7\n      mtu: 1400\n"
        "# password: is not one\n  ethernets:\n    enP7s7: {dhcp4: true}\n"
    )
    kept = probe.without_secrets(text)
    assert "hunter" not in kept
    for honest in ("identity: alice", "mtu: 1400", "enP7s7: {dhcp4: true}", "access-points:"):
        assert honest in kept


def test_a_text_without_secrets_stays_as_it_is() -> None:
    text = "network:\n  version: 2\n\n  ethernets:\n    enp1s0f0np0:\n      addresses: [192.168.100.10/24]\n"
    assert probe.without_secrets(text) == text
