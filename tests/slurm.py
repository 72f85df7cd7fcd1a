"""A real Slurm of two nodes, both this machine: slurmctld, two slurmd and munge of its own, gone with the block that made it.

Needs root and the Debian packages of tests/packages.txt. The nodes are named n0 and n1; only what runs on them knows these names.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.lab import eventually

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/linear
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/builtin
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=60 State=UP
"""
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")


class NoSlurmError(RuntimeError):
    """It cannot be had here; says why."""


@contextmanager
def running() -> Iterator[Path]:
    """Its configuration file, for $SLURM_CONF, as soon as both nodes are idle.

    Raises:
        NoSlurmError: a program of it is missing, or it does not start on this machine.
    """
    if os.geteuid() or (lacking := [name for name in _PROGRAMS if not _which(name)]):
        raise NoSlurmError("not root" if os.geteuid() else f"no {', '.join(lacking)}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp")))
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "hosts").write_text("127.0.0.1 localhost n0 n1\n")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        conf = folder / "slurm.conf"
        conf.write_text(_CONF.format(host=socket.gethostname().split(".")[0], folder=folder, ports=_free_ports(3)))
        places = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "munge.pid"}
        places |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
        try:
            stack.enter_context(_daemon(conf, ["munged", "-F", "--force", *(f"--{k}={v}" for k, v in places.items())]))
            eventually((folder / "munge.sock").exists, 30, "munge's socket")
            stack.enter_context(_daemon(conf, ["slurmctld", "-D", "-c"]))
            for name in ("n0", "n1"):
                stack.enter_context(_daemon(conf, ["slurmd", "-D", "-N", name], hosts=folder / "hosts"))
            eventually(lambda: _idle(conf), 60, "two idle nodes")
        except (TimeoutError, OSError) as error:
            said = "".join(path.read_text(errors="replace")[-500:] for path in sorted(folder.glob("*.log")))
            raise NoSlurmError(f"{error}: {said}") from None
        yield conf


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in found]


@contextmanager
def _daemon(conf: Path, argv: list[str], *, hosts: Path | None = None) -> Iterator[None]:
    words = [str(_which(argv[0])), *argv[1:]]
    if hosts is not None:  # what runs on the node finds the nodes' names; this machine's own file stays as it is
        enter = f'mount --bind {hosts} /etc/hosts && exec "$@"'
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", enter, "sh", *words]
    environment = os.environ | {"SLURM_CONF": str(conf)}
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as it:
        try:
            yield
        finally:
            it.terminate()
            with suppress(subprocess.TimeoutExpired):
                it.wait(20)
            it.kill()


def _idle(conf: Path) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=os.environ | {"SLURM_CONF": str(conf)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout.split() == ["idle", "idle"]
