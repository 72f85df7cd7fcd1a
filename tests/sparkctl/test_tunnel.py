"""`tunnel` for what is no model: TensorBoard of a fine-tune, and the ports of a command; on loopback, and back after a loss."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.commandline import CommandLine, finished, gone, losses, wait_for

pytestmark = pytest.mark.timeout(300)


def get(url: str) -> tuple[int, bytes]:
    """One request; 0 where nobody answers."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", parts.path + (f"?{parts.query}" if parts.query else ""))
        response = connection.getresponse()
        return response.status, response.read()
    connection.close()
    return 0, b""


def _boards(folder: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "board" in (process.info["cmdline"] or []) and str(folder) in process.info["cmdline"]
    ]


def test_tensorboard_of_a_fine_tune_is_brought_here_and_comes_back() -> None:
    seen = finished()
    with seen.commands.started("tunnel", seen.job.id[-4:], "--json") as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        url = told["tensorboard"]
        parts = urlsplit(url)
        assert (told["job"], parts.hostname) == (seen.job.id, "127.0.0.1")
        assert get(url)[0] == 200

        def scalars() -> Any:
            status, body = get(f"{url}data/plugin/scalars/scalars?run=.&tag=train/loss")
            return [value for _, _, value in json.loads(body)] if status == 200 else None

        assert wait_for(scalars, 60) == pytest.approx(losses(seen.job), abs=1e-5)
        (board,) = _boards(seen.job.path)
        listening = {one.laddr.ip for one in board.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
        there = next(one.laddr.port for one in board.net_connections("tcp") if one.status == psutil.CONN_LISTEN)
        assert get(f"http://127.0.0.1:{there}/")[0] == 404  # who does not know the path sees nothing
        assert parts.path.strip("/") not in " ".join(board.cmdline())
        assert board.children(recursive=True) == []
        board.kill()
        wait_for(lambda: get(url)[0] == 200, 60)
        (again,) = [one for one in _boards(seen.job.path) if one.pid != board.pid and not gone(one.pid)]
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    wait_for(lambda: gone(again.pid), 30)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_the_ports_of_a_command_are_brought_here(tmp_path: Path) -> None:
    commands, port = CommandLine(tmp_path), _free_port()
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("the page of the program")
    argv = [
        sys.executable,
        "-m",
        "http.server",
        str(port),
        "--bind",
        "127.0.0.1",
        "--directory",
        str(tmp_path / "page"),
    ]
    recipe = {"kind": "command", "name": "page", "nodes": 1, "command": argv, "ports": [port]}
    (tmp_path / "page.yaml").write_text(json.dumps(recipe | {"ready": f"http://127.0.0.1:{port}/"}))
    job = commands.detach("page.yaml")
    try:
        wait_for(lambda: job.state().ended or job.state().state == "ready", 120)
        with commands.started("tunnel", job.id, "--port", str(_free_port()), "--json") as process:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["ports"][str(port)]
            assert urlsplit(url).port != port
            assert get(url) == (200, b"the page of the program")
            stopping = threading.Thread(target=commands, args=("stop", job.id))
            stopping.start()
            assert process.wait(90) == 0  # it ends with the job
            assert process.stdout.read() == ""
            stopping.join()
        ended = commands("tunnel", job.id)
        assert (ended.returncode, ended.stderr.splitlines()[0]) == (3, f"error: job {job.id} is stopped")
    finally:
        commands.end_all()


def test_a_command_without_ports_is_refused_by_name(tmp_path: Path) -> None:
    commands = CommandLine(tmp_path)
    (tmp_path / "none.yaml").write_text(
        json.dumps({"kind": "command", "name": "none", "nodes": 1, "command": ["true"]})
    )
    job = commands.detach("none.yaml")
    done = commands("tunnel", job.id)
    assert (done.returncode, done.stderr) == (
        3,
        f"error: job {job.id} names no ports\n  try: put `ports: [8888]` into its recipe\n",
    )
    wait_for(lambda: job.state().ended, 120)
    commands.end_all()
