"""Two simulated DGX Sparks on one Linux machine, each a set of namespaces with real systemd, sshd and NetworkManager."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from . import cgroup, laptop, requirements
from .daemon import Daemon, python
from .disk import UID, USER, Identity
from .host import Host
from .machine import Box, Machine
from .processes import keeper
from .processes.facts import PORTS, Facts

RUN, PREFIX = Path("/run"), "sparklab-"
"""Where a lab keeps its folder while it is up; hosts see nothing of it."""


class Lab:
    """The pair, its cables, and a laptop user's home to reach it from; a context manager.

    Args:
        init: ``systemd`` (as a DGX OS does) or ``simple`` (sshd and a network only, but up at once).
        network: who has the interfaces under systemd; netplan works with both.
        bind: folders seen read-only in the same place on both hosts; a virtual environment brings its interpreter along.
        models: a folder of real disk; the subfolder of each host's name becomes its /srv/models, and stays afterwards.
        memory: bytes that a host may use (its root file system included), one for both or one each.
        disk: bytes of each host's root file system, a tmpfs.
        home: the home folder of user ``spark``.
        names: of the hosts, head first.
        cables: for each cable, the QSFP port (0 or 1) that it is in at each host. A cable is two rails.

    Nothing of a lab outlives the process that made it. Needs root: ``Lab.missing()`` says what is not there.
    """

    def __init__(
        self,
        *,
        init: Literal["systemd", "simple"] = "systemd",
        network: Literal["networkmanager", "networkd"] = "networkmanager",
        bind: Sequence[str | Path] = (),
        models: str | Path | None = None,
        memory: int | tuple[int, int] | None = None,
        disk: int = 8 << 30,
        home: str = f"/home/{USER}",
        names: tuple[str, str] = ("spark-a", "spark-b"),
        cables: Sequence[tuple[int, int]] = ((0, 0),),
    ) -> None:
        self._init, self._network, self._user_home, self._disk = init, network, home, disk
        self._bind = tuple(dict.fromkeys(path for folder in bind for path in _with_interpreter(Path(folder))))
        self._models = Path(models).resolve() if models else None
        self._memory = memory if isinstance(memory, tuple) else (memory, memory)
        self._names = names
        self._rails = [tuple(port for cable in cables for port in PORTS[cable[side]]) for side in (0, 1)]
        self._keeper: Daemon | None = None
        self._reaps: list[Callable[[], object]] = []  # looks for children that have ended
        self._interface = ""
        self._workdir = Path()
        self.hosts: tuple[Host, ...] = ()

    @staticmethod
    def missing() -> str | None:
        """In one line, what this machine lacks for a lab; None when it has everything."""
        return requirements.missing()

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # Up and down.

    def up(self) -> Self:
        """Boot both hosts and wait for their sshd."""
        sweep()
        try:
            self._start()
        except BaseException:
            self.down()
            raise
        return self

    def _start(self) -> None:
        self._workdir = Path(tempfile.mkdtemp(prefix=PREFIX, dir=RUN))
        groups = [
            cgroup.plan(f"{self._workdir.name}-{name}", limit, self._init == "systemd")
            for name, limit in zip(self._names, self._memory, strict=True)
        ]
        self._keeper = self._start_keeper([folder for group in groups for folder in group.folders])
        for group in groups:
            group.create()
        self.identity_file.parent.mkdir(parents=True, mode=0o700)
        laptop.make_keys([self.identity_file, *map(self._host_key, self._names)])
        self._keeper.wait_ready()
        self._room = self._start_room(self._keeper.pid)
        self._reaps = [self._room.process.poll]
        machines = [self._machine(side, group, self._keeper.pid) for side, group in enumerate(groups)]
        self._room.wait_ready()
        self._interface, network = laptop.plug_in(self._room.pid)
        identities = [self._identity(side, network) for side in (0, 1)]
        facts = Facts()
        for machine, identity in zip(machines, identities, strict=True):
            machine.format(identity, facts)
            machine.boot()
        for machine in machines:
            machine.hand_over()
        self.hosts = tuple(
            Host(machine, identity, facts) for machine, identity in zip(machines, identities, strict=True)
        )
        self.trust()
        for host in self.hosts:
            host.wait_ssh()

    def _start_keeper(self, groups: list[Path]) -> Daemon:
        owner, held = os.pidfd_open(os.getpid()), keeper.lock(self._workdir)
        argv = [*python("keeper"), str(owner), str(self._workdir), *map(str, groups)]
        try:
            return Daemon(argv, self._workdir / "keeper.log", within=None, pass_fds=(owner, held))
        finally:
            os.close(owner)
            os.close(held)

    def _start_room(self, keeper_pid: int) -> Daemon:
        rails = map(",".join, zip(*self._rails, strict=True))
        return Daemon(
            ["unshare", "--net", "--", *python("room"), *rails], self._workdir / "room.log", within=keeper_pid
        )

    def _machine(self, side: int, group: cgroup.Cgroup, keeper_pid: int) -> Machine:
        name = self._names[side]
        models = self._models and self._models / name
        if models:
            models.mkdir(parents=True, exist_ok=True)
            os.chown(models, UID, UID)
        box = Box(name, side, self._init, self._workdir, group, self._disk, self._rails[side], self._bind, models)
        machine = Machine(box, keeper_pid, self._room)
        self._reaps.append(machine.reap)
        return machine

    def _identity(self, side: int, network: IPv4Network) -> Identity:
        return Identity(
            name=self._names[side],
            address=str(network[11 + side]),
            gateway=str(network[1]),
            home=self._user_home,
            init=self._init,
            network=self._network,
            authorized_key=self.identity_file.with_suffix(".pub").read_text().strip(),
            host_key=self._host_key(self._names[side]),
        )

    def _host_key(self, name: str) -> Path:
        return self._workdir / f"host_key_{name}"

    def down(self) -> None:
        """End everything; the second time does nothing."""
        running, self._keeper = self._keeper, None
        if running is None:
            return
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it, and all of the lab with it
            running.tell("down")
        try:
            running.wait(20, self._reap)
        except TimeoutError:
            running.process.kill()
            raise
        finally:
            if self._interface:
                laptop.unplug(self._interface)
        if self._workdir.exists():
            sweep()

    def _reap(self) -> None:
        for look in self._reaps:
            look()

    # The laptop.

    @property
    def home(self) -> Path:
        """A laptop user's home: .ssh/{id_ed25519,known_hosts,config} and inventory.yaml. Use it as $HOME."""
        return self._workdir / "home"

    @property
    def identity_file(self) -> Path:
        return self.home / ".ssh" / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.home / ".ssh" / "known_hosts"

    @property
    def ssh_config(self) -> Path:
        """For ``ssh -F``; knows both hosts by name."""
        return self.home / ".ssh" / "config"

    @property
    def inventory_file(self) -> Path:
        return self.home / "inventory.yaml"

    def inventory(self) -> str:
        """The pair as the text of an inventory.yaml."""
        return self.inventory_file.read_text()

    def ssh(
        self, host: Host, command: str, *, input: str = "", timeout: float = 20
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as a laptop user would, over the network; the status is 255 when ssh itself fails."""
        argv = ["ssh", "-F", str(self.ssh_config), host.name, "--", command]
        return subprocess.run(argv, input=input, capture_output=True, text=True, timeout=timeout, check=False)

    def trust(self) -> None:
        """Write the laptop's files, with the host keys as they are now."""
        laptop.furnish(self.home, self.hosts, [host.host_key() for host in self.hosts])

    # The cables. Rail n is the n-th of each host's ``rails``.

    def cut(self, rail: int | None = None) -> None:
        """Cut one rail, or all: carrier drops at both ends, and both interfaces stay up."""
        self._each("cut", rail)

    def heal(self, rail: int | None = None) -> None:
        self._each("heal", rail)

    def slow(self, rail: int | None, mbit: int | None) -> None:
        """Limit what one rail (None: each) carries in each direction, in Mbit/s; None takes the limit off."""
        self._each("slow", rail, mbit or 0)

    def _each(self, verb: str, rail: int | None, *words: object) -> None:
        for number in range(len(self._rails[0])) if rail is None else [rail]:
            self._room.ask(verb, number, *words)


def sweep() -> None:
    """Remove what a lab left whose keeper was killed too: its folder and its control groups."""
    here = cgroup.hierarchies()
    groups = [group for root in (here.unified, here.memory) if root for group in root.glob(f"{PREFIX}*")]
    labs = {folder.name for folder in RUN.glob(f"{PREFIX}*")} | {
        "-".join(group.name.split("-")[:2]) for group in groups
    }
    for lab in labs:
        if not keeper.locked(RUN / lab):
            keeper.remove(RUN / lab, [group for group in groups if group.name.startswith(f"{lab}-")])


def _with_interpreter(folder: Path) -> list[Path]:
    """The folder and, for a virtual environment outside /usr, the installation that its interpreter belongs to."""
    settings = folder / "pyvenv.cfg"
    if not settings.exists():
        return [folder]
    (home,) = [line.partition("=")[2].strip() for line in settings.read_text().splitlines() if line.startswith("home")]
    base = Path(home).parent
    return [folder] if base.is_relative_to("/usr") else [base, folder]
