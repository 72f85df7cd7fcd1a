"""A rank without our agent: started by torchrun, or started wrongly."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.job import JobFolder
from tests.commandline import finished, losses

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def copied(tmp_path: Path) -> JobFolder:
    """The finished fine-tune's folder as it was before it ran."""
    job = JobFolder(tmp_path / "job")
    job.path.mkdir()
    shutil.copy(finished().job.spec_file, job.spec_file)
    return job


def _environment(**changes: str) -> dict[str, str]:
    return {**os.environ, **finished().job.spec().env, "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", **changes}


def test_torchrun_gives_the_losses_that_the_agent_gives(copied: JobFolder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=static", "--master-addr=127.0.0.1"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, f"--master-port={port}", "-m", "sparkctl", "worker", str(copied.path)],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(copied) == losses(finished().job)
    assert (copied.adapter / "adapter_model.safetensors").is_file()


def test_a_rank_in_a_world_of_another_size_ends_at_once(copied: JobFolder) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparkctl", "worker", str(copied.path)],
        env=_environment(RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "error: rank 0: started in a world of 3, but the job has 2 ranks\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert not copied.metrics.exists()
