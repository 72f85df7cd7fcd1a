"""An exported script is a real one: it trains as the job itself does, started by torchrun or (a stand-in for) Slurm's srun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from launch.export import command_script
from launch.job import JobFolder
from launch.recipe import CommandRecipe
from tests.commandline import finished, losses
from tests.slurm import NoSlurmError, running

pytestmark = pytest.mark.timeout(900)

# What srun and scontrol do for a script of two tasks, as far as it uses them; Slurm itself is not needed to see that.
SRUN = """#!/bin/bash
while [ "${1#-}" != "$1" ]; do shift; done
SLURM_NTASKS=2 SLURM_PROCID=1 "$@" & other=$!
SLURM_NTASKS=2 SLURM_PROCID=0 "$@" || { kill $other; exit 1; }
wait $other
"""
SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames nodes-[1-2]" ] && printf '127.0.0.1\\nlocalhost\\n'
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def environment(slurm: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    root = str(Path(__file__).resolve().parents[2])
    return kept | {
        "PATH": f"{slurm}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "nodes-[1-2]",
        "PYTHON": sys.executable,
        "PYTHONPATH": root,
        "GLOO_SOCKET_IFNAME": "lo",
        **more,
    }


@pytest.mark.parametrize(("target", "shell"), [("torchrun", "sh"), ("slurm", "bash")])
def test_the_script_trains_as_the_job_does(
    target: str, shell: str, slurm: Path, tmp_path: Path, unused_port: int
) -> None:
    seen = finished()
    script = tmp_path / "script"
    done = seen.commands("export", "tiny.yaml", "--to", target, "-o", str(script))
    assert done.returncode == 0, done.stderr
    job = JobFolder(tmp_path / "job")
    given = environment(slurm, SPARKCTL_JOB=str(job.path), MASTER_PORT=str(unused_port))
    ran = subprocess.run(
        [shell, str(script)], cwd=tmp_path, env=given, capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert losses(job) == pytest.approx(losses(seen.job), abs=1e-6)
    assert len(losses(job)) == 12


@pytest.fixture(scope="module")
def real_slurm() -> Iterator[Path]:
    """The configuration of a Slurm that runs; where none will, its stand-in above has to do."""
    with ExitStack() as stack:
        try:
            yield stack.enter_context(running())
        except NoSlurmError as error:
            pytest.skip(f"Slurm: {error}")


def submit(conf: Path, script: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Hand a script to it, and wait for the job's end; the output of the job."""
    given = {name: value for name, value in environment(script.parent, **more).items() if not name.startswith("SLURM_")}
    log = script.parent / "job.log"
    done = subprocess.run(
        ["sbatch", "--wait", f"--output={log}", str(script)],
        cwd=script.parent,
        env=given | {"SLURM_CONF": str(conf)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, log.read_text() if log.exists() else "", done.stderr)


def test_a_real_slurm_trains_as_the_job_does(real_slurm: Path, tmp_path: Path, unused_port: int) -> None:
    seen = finished()
    script = tmp_path / "script"
    assert seen.commands("export", "tiny.yaml", "--to", "slurm", "-o", str(script)).returncode == 0
    job = JobFolder(tmp_path / "job")
    ran = submit(real_slurm, script, SPARKCTL_JOB=str(job.path), MASTER_PORT=str(unused_port))
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert losses(job) == pytest.approx(losses(seen.job), abs=1e-6)
    assert len(losses(job)) == 12


def test_a_real_slurm_runs_each_side_of_a_command(real_slurm: Path, tmp_path: Path) -> None:
    sides = {
        "head": ["echo", "head", "{node_rank}", "{peer_addr}"],
        "peer": ["echo", "peer", "{node_rank}", "{head_addr}"],
    }
    script = tmp_path / "script"
    script.write_text(command_script(command(command=sides), "slurm", version="0"))
    ran = submit(real_slurm, script)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert sorted(ran.stdout.splitlines()) == ["head 0 n1", "peer 1 n0"]


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


def command(**keys: object) -> CommandRecipe:
    return CommandRecipe.model_validate({"kind": "command", "name": "it", **keys})


def test_a_command_keeps_its_words_from_the_shell(slurm: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-c",
        "import sys; sys.stdout.write(f'{sys.argv[1:]}\\n')",
        "{node_rank}",
        "$(touch x) `y` 'z",
        "{head_addr}:9",
    ]
    text = command_script(command(command=words, env={"GREETING": "it's"}), "slurm", version="0")
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=tmp_path,
        env=environment(slurm),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = sorted(done.stdout.splitlines())
    assert shown == [str([str(rank), "$(touch x) `y` 'z", "127.0.0.1:9"]) for rank in (0, 1)]
    assert not (tmp_path / "x").exists()


def test_a_secret_is_asked_for_and_not_written(slurm: Path, tmp_path: Path) -> None:
    wanted = command(command={"peer": ["sh", "-c", "echo $HF_TOKEN"]}, env={"HF_TOKEN": "hunter2"})
    text = command_script(wanted, "torchrun", version="0")
    assert "hunter2" not in text
    given = {"NODE_RANK": "1", "MASTER_ADDR": "a", "PEER_ADDR": "b", "PATH": os.environ["PATH"]}
    run = ["sh", "-c", text]
    lacking = subprocess.run(run, env=given, capture_output=True, text=True, timeout=60, check=False)
    assert lacking.returncode != 0
    assert "HF_TOKEN" in lacking.stderr
    done = subprocess.run(run, env=given | {"HF_TOKEN": "x"}, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "x\n"
    other = subprocess.run(
        run, env=given | {"HF_TOKEN": "x", "NODE_RANK": "0"}, capture_output=True, text=True, timeout=60, check=True
    )
    assert other.stdout == "nothing to do here\n"
