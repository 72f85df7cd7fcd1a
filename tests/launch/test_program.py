"""Other programs as jobs of the embedded pair: started with the pair's words and environment, watched, ended, nothing left."""

from __future__ import annotations

import json
import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.job import JobFolder
from tests.commandline import CommandLine, gone, pids, wait_for

pytestmark = pytest.mark.timeout(900)

REDUCES = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
one = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(one)
print("the sum is", one.item(), "of", dist.get_world_size(), flush=True)
dist.destroy_process_group()
"""
# Stands in for docker: notes how it was called, and runs the program beside us instead of in a container.
DOCKER = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/called"
[ "$1" = run ] || exit 0
while [ "$1" != img:1 ]; do shift; done
shift
exec "$@"
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    folder = tmp_path_factory.mktemp("programs")
    found = CommandLine(folder)
    (folder / "bin").mkdir()
    found.environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    yield found
    found.end_all()


def recipe(commands: CommandLine, name: str, **keys: object) -> str:
    text = json.dumps({"kind": "command", "name": name, **keys})  # JSON is YAML too
    (commands.folder / f"{name}.yaml").write_text(text)
    return f"{name}.yaml"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-u", "-c", code, *words]


def log(job: JobFolder, rank: int) -> str:
    path = job.log(rank)
    return path.read_text() if path.exists() else ""


def until(job: JobFolder, *states: str) -> str:
    return str(wait_for(lambda: (state := job.state().state) in (*states, "failed") and state))


def test_a_pair_of_servers_is_ready_when_it_answers_and_gone_when_stopped(commands: CommandLine) -> None:
    ports = free_port(), free_port()
    serve = {
        side: [sys.executable, "-m", "http.server", str(port), "--bind", "{head_addr}"]
        for side, port in zip(("head", "peer"), ports, strict=True)
    }
    name = recipe(commands, "servers", command=serve, ready=f"http://127.0.0.1:{ports[0]}/", ports=[ports[0]])
    job = commands.detach(name)
    assert until(job, "ready") == "ready", log(job, 0) + log(job, 1)
    for port in ports:
        wait_for(lambda port=port: _answers(port))
    processes = pids(job)
    stopped = commands("stop", job.id)
    assert stopped.returncode == 0, stopped.stderr
    wait_for(lambda: all(gone(pid) for pid in processes))  # the agent goes a moment after its last word
    for port in ports:
        with socket.create_server(("127.0.0.1", port)):
            pass  # nothing listens there any more


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_torchrun_joins_both_sides_and_its_output_is_followed(commands: CommandLine) -> None:
    (commands.folder / "reduces.py").write_text(REDUCES)
    words = [
        "torchrun",
        "--nnodes",
        "2",
        "--node-rank",
        "{node_rank}",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "{head_addr}",
    ]
    words += ["--master-port", str(free_port()), str(commands.folder / "reduces.py")]
    done = commands("run", recipe(commands, "reduces", command=words), seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0 | the sum is 3.0 of 2" in done.stdout
    assert "rank 1 | the sum is 3.0 of 2" in done.stdout
    assert done.stdout.endswith("succeeded\n")


def test_a_script_finds_its_rendezvous_in_its_environment(commands: CommandLine) -> None:
    done = commands("run", recipe(commands, "direct", command=python(REDUCES)), seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the sum is 3.0 of 2") == 2


def test_its_secrets_stand_in_no_file_and_its_log_tells_when_it_is_ready(commands: CommandLine) -> None:
    code = "import os, time; print(len(os.environ['MY_TOKEN']), os.environ['PLAIN'], 'up at last'); time.sleep(600)"
    name = recipe(
        commands, "secretive", command={"peer": python(code)}, env={"MY_TOKEN": "hunter2", "PLAIN": "x"}, ready="up at (first|last)"
    )  # fmt: skip
    job = commands.detach(name)
    assert until(job, "ready") == "ready", log(job, 0)
    assert log(job, 0) == "7 x up at last\n"
    assert len(job.spec().ranks) == 1, "the head runs nothing"
    for file in job.path.rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file
    assert commands("stop", job.id, "--now").returncode == 0


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["no-such-program"], "no-such-program: No such file or directory"),
        (python("import sys; sys.exit(3)"), "ended with status 3 at once"),
    ],
    ids=["missing", "failing"],
)
def test_what_would_fail_again_is_not_tried_again(commands: CommandLine, command: list[str], told: str) -> None:
    done = commands("run", recipe(commands, "fails", command=command, nodes=1))
    assert done.returncode in (1, 2), done.stdout
    assert told in done.stderr
    assert commands.jobs()[-1].state().attempt == 1


def test_an_image_wraps_the_command_and_its_container_is_removed(commands: CommandLine) -> None:
    docker = commands.folder / "bin" / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    name = recipe(
        commands, "boxed", command=python("print('inside', {node_rank})"), image="img:1", env={"A_TOKEN": "hunter2"}
    )
    done = commands("run", name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"rank 0 | inside 0", "rank 1 | inside 1"} <= set(done.stdout.splitlines())
    called = (docker.parent / "called").read_text()
    runs = [line for line in called.splitlines() if line.startswith("run ")]
    assert len(runs) == 2
    assert all("--network host --ipc host --ulimit memlock=-1" in line and "--env A_TOKEN" in line for line in runs)
    assert "hunter2" not in called
    assert called.count("rm --force sparkctl-boxed") == 4, "before, for what a power cut has left, and after"


def test_a_dry_run_shows_each_sides_command_and_starts_nothing(commands: CommandLine, tmp_path: Path) -> None:
    before = len(commands.jobs())
    done = commands("run", recipe(commands, "shown", command={"head": "a {node_rank}", "peer": "b"}), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "left: a '{node_rank}'\nright: b\n"
    assert len(commands.jobs()) == before
    planned = commands("plan", "shown.yaml")
    assert planned.returncode == 3
    assert "nothing to plan" in planned.stderr
