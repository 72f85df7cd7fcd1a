"""One simulated host, as a test uses it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import clock, disk
from .disk import PATH, UID, USER, Identity
from .machine import Machine
from .processes.facts import Facts
from .waiting import eventually

User = Literal["spark", "root"]
GUARD = "-sys_time,-sys_module,-sys_rawio,-syslog,-mknod,-wake_alarm"
"""Capabilities that nothing in a host has: this machine's clock, kernel modules, devices and kernel log are its own."""


class PoweredOffError(RuntimeError):
    """The host has no power."""


@dataclass(frozen=True)
class Process:
    """A process of a host; ``pid`` as this machine counts, so that a test can signal it."""

    pid: int
    argv: tuple[str, ...]
    program: str  # /proc/PID/exe, "" for a zombie


@dataclass(frozen=True)
class Counters:
    """Bytes that an interface has received and sent since the host's boot."""

    received: int
    sent: int


class Host:
    """A simulated Spark: ``name``, its management ``address``, and the interfaces (``rails``) that are cabled."""

    def __init__(self, machine: Machine, identity: Identity, facts: Facts) -> None:
        self._machine = machine
        self._facts = facts
        self.name = identity.name
        self.address = identity.address
        self.home = identity.home
        self.rails = machine.box.rails

    # Looking in and acting, past the network.

    def run(
        self,
        argv: Sequence[str | Path],
        user: User = "spark",
        *,
        check: bool = True,
        input: str | bytes | None = None,
        timeout: float | None = 60,
        text: bool = True,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a program on the host, in the user's home and with a login's environment, its output captured.

        Raises subprocess.CalledProcessError (with ``check``) and subprocess.TimeoutExpired; after the latter nothing of
        the program's process group is left. Raises PoweredOffError.
        """
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        process = self.start(argv, user, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=text)
        try:
            stdout, stderr = process.communicate(input, timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        done = subprocess.CompletedProcess(list(map(str, argv)), process.returncode, stdout, stderr)
        if check and done.returncode:
            raise subprocess.CalledProcessError(done.returncode, done.args, stdout, stderr)
        return done

    def start(self, argv: Sequence[str | Path], user: User = "spark", **options: Any) -> subprocess.Popen[Any]:
        """Start a program on the host; ``options`` are subprocess.Popen's.

        The Popen is the program itself, leader of its own process group: its signals and status are the program's.
        """
        env = ["env", "-i", f"--chdir={self.home if user == USER else '/root'}", *self._environment(user)]
        become = ["--reuid", user, "--regid", user, "--init-groups"] if user != "root" else []
        command = ["setpriv", "--bounding-set", GUARD, *become, "--", *env, *map(str, argv)]
        return self._machine.visit(self._enter(command), env={"PATH": PATH}, **options)

    def _enter(self, command: list[str]) -> list[str]:
        """The argv that has ``command`` run as one of the host's programs; its process namespace is given (Machine.visit)."""
        spaces = ["--mount", "--uts", "--ipc", "--net", *(["--cgroup"] if self._systemd else [])]
        return ["nsenter", "--target", str(self.pid), *spaces, "--root", "--wd", "--", *command]

    def _environment(self, user: User) -> list[str]:
        home, uid = (self.home, UID) if user == USER else ("/root", 0)
        env = {"HOME": home, "USER": user, "LOGNAME": user, "SHELL": "/bin/bash", "PATH": PATH, "LANG": "C.UTF-8"}
        if self._systemd:
            env["XDG_RUNTIME_DIR"] = f"/run/user/{uid}"
        return [f"{name}={value}" for name, value in env.items()]

    def read(self, path: str | Path) -> bytes:
        """A file of the host. Raises FileNotFoundError."""
        answer = self.run(["cat", "--", path], "root", check=False, text=False)
        if answer.returncode:
            raise FileNotFoundError(f"{self.name}:{path}: {answer.stderr.decode().strip()}")
        data: bytes = answer.stdout
        return data

    def write(self, path: str | Path, data: str | bytes, *, user: User = "spark", mode: int = 0o644) -> None:
        """Write a file of the host, with the folders above it, as ``user``."""
        self.run(["mkdir", "-p", "--", Path(path).parent], user)
        data = data.encode() if isinstance(data, str) else data
        self.run(["dd", f"of={path}", "status=none"], user, input=data, text=False)
        self.run(["chmod", f"{mode:o}", "--", path], user)

    @property
    def pid(self) -> int:
        """The host's PID 1, as this machine counts. Raises PoweredOffError."""
        if not self.on:
            raise PoweredOffError(f"{self.name} is off")
        return self._machine.pid

    @property
    def on(self) -> bool:
        """Whether it has power and has not halted by itself."""
        return bool(self._machine.pid) and Path(f"/proc/{self._machine.pid}").exists()

    def processes(self) -> list[Process]:
        """Every process of the host, its PID 1 first."""
        namespace = os.stat(f"/proc/{self.pid}/ns/pid").st_ino  # noqa: PTH116
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and (folder / "ns/pid").stat().st_ino == namespace:
                    found.append(_process(folder))
            except OSError:
                continue  # it has just ended
        return sorted(found, key=lambda process: (process.pid != self.pid, process.pid))

    def pids(self) -> list[int]:
        """Process ids of the host, as this machine counts."""
        return [process.pid for process in self.processes()]

    def counters(self, interface: str) -> Counters:
        shown = self.run(["ip", "-j", "-s", "link", "show", "dev", interface]).stdout
        (link,) = json.loads(shown)
        return Counters(link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"])

    def carrier(self, interface: str) -> bool:
        """Whether an interface, which must be up, has carrier."""
        return self.read(f"/sys/class/net/{interface}/carrier") == b"1\n"

    # Power.

    def power_off(self) -> None:
        """Pull the plug: every cable dark before anything dies, no goodbye on the wire; what is on disk stays."""
        if not self._machine.pid:
            raise PoweredOffError(f"{self.name} is off already")
        self._machine.power_off()

    def power_on(self, *, wait: bool = True) -> None:
        """Boot; ``wait`` until sshd answers."""
        if self._machine.pid:
            if self.on:
                raise RuntimeError(f"{self.name} is on already")
            self._machine.power_off()  # it halted by itself
        self._machine.boot()
        self._machine.hand_over()
        if wait:
            self.wait_ssh()

    def reboot(self, *, wait: bool = True) -> None:
        """What `sudo reboot` does: services stop in order; a host that has not stopped them within 30 s loses power."""
        if self._systemd:
            self.run(["systemctl", "--no-block", "reboot"], "root")
            with contextlib.suppress(TimeoutError):
                self._until(self._stopped, 30, "the end of all services")
        self._machine.power_off()
        self.power_on(wait=wait)

    def _stopped(self) -> bool:
        """Whether systemd has handed over to its last program, which only waits for processes that we brought in."""
        return not self.on or "systemd-shutdown" in _process(Path(f"/proc/{self.pid}")).program

    def wait_ssh(self, timeout: float = 20) -> None:
        """Wait until sshd greets. Raises TimeoutError with the end of the host's console."""

        def greeted() -> bool:
            if not self.on:
                raise PoweredOffError(f"{self.name} ended while booting: {self._console()}")
            if not self._has_address():
                return False  # asking too early costs a second: a lost ARP request is not repeated sooner
            try:
                with socket.create_connection((self.address, 22), 0.3) as connection:
                    return connection.recv(4) == b"SSH-"
            except OSError:
                return False

        self._until(greeted, timeout, "the greeting of sshd")

    def _has_address(self) -> bool:
        return f" {self.address}\n" in Path(f"/proc/{self.pid}/net/fib_trie").read_text()

    # What an owner, or bad luck, may do to it.

    def facts(self, **changes: Any) -> Facts:
        """Change what the host says of its hardware (fields of facts.Facts) and return all of it."""
        before = self._facts
        self._facts = dataclasses.replace(before, **changes)
        self._machine.write_facts(self._facts)
        old = before.files()
        for path, text in self._facts.files().items():
            if text != old[path]:
                self._replace(path, text)
        if bool(self._facts.ib_write_bw) != bool(before.ib_write_bw):
            tool = disk.HERE / "bin" / "ib_write_bw"
            self._replace("/usr/bin/ib_write_bw", tool.read_text() if self._facts.ib_write_bw else None, mode=0o755)
        return self._facts

    def _replace(self, path: str, text: str | None, *, mode: int = 0o644) -> None:
        if text is None:
            self.run(["rm", "-f", path], "root")
        else:
            self.write(path, text, user="root", mode=mode)

    def sshd(self, on: bool, *, sessions: bool = True) -> None:
        """Stop sshd (with ``sessions``: and kill its open connections, as `killall sshd` would), or start it and wait."""
        if self._systemd:
            self.run(["systemctl", "start" if on else "stop", "ssh.service"], "root")
        else:
            os.kill(self.pid, signal.SIGUSR2 if on else signal.SIGUSR1)
        if on:
            self.wait_ssh()
            return
        self._until(lambda: not any(_listens(process) for process in self.processes()), 5, "the end of sshd")
        if sessions:
            for process in self.processes():
                if process.program.endswith("/sshd"):
                    os.kill(process.pid, signal.SIGKILL)

    def management(self, on: bool) -> None:
        """Plug the management cable in or out."""
        self._machine.room.ask("management", self._machine.box.side, "on" if on else "off")

    def sudo_password(self, password: str | None) -> None:
        """Have sudo ask for ``password``; None: ask for nothing, as at the start."""
        if password is not None:
            self.run(["chpasswd"], "root", input=f"{USER}:{password}\n")
        rule = disk.sudo_rule(password=password is not None)
        self.write(f"/etc/sudoers.d/{USER}", rule, user="root", mode=0o440)

    def change_host_key(self) -> None:
        """As a reinstallation, or a man in the middle, would: a new host key, which no known_hosts file has."""
        self.run(["rm", "/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/ssh_host_ed25519_key.pub"], "root")
        self.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/etc/ssh/ssh_host_ed25519_key"], "root")
        self.sshd(False, sessions=False)
        self.sshd(True)

    def host_key(self) -> str:
        """Type and public key, as in a known_hosts line."""
        return " ".join(self.read("/etc/ssh/ssh_host_ed25519_key.pub").decode().split()[:2])

    def fill_disk(self, leave: int = 0) -> None:
        """Leave only ``leave`` bytes free on the root file system (not in /srv/models) until ``free_disk``."""
        self.free_disk()
        now = os.statvfs(self._machine.disk)
        self._resize((now.f_blocks - now.f_bfree) * now.f_frsize + leave)

    def free_disk(self) -> None:
        self._resize(self._machine.box.disk)

    def _resize(self, size: int) -> None:
        inside = ["nsenter", f"--mount=/proc/{self._machine.hardware.pid}/ns/mnt", "--"]
        size = max(size, os.sysconf("SC_PAGE_SIZE"))  # 0 would mean no limit
        remount = ["mount", "-o", f"remount,size={size}", str(self._machine.folder)]
        subprocess.run([*inside, *remount], check=True)

    def skew_clock(self, seconds: float) -> None:
        """Put the host's wall clock off by ``seconds``, for sessions, services and sudo alike; 0 puts it right.

        The kernel has one wall clock for all its namespaces, so a preloaded library moves it (clock.c): every program that
        has started since the host's first skew (0 will do) sees each new one at once. Monotonic clocks stay true, as do
        the times of files.
        """
        self._machine.write_skew(clock.encode(seconds))
        if self.run(["test", "-e", clock.PRELOAD], check=False).returncode:
            library = clock.build(self._machine.box.workdir)
            self.write(clock.LIBRARY, library, user="root", mode=0o755)
            self.write(clock.PRELOAD, f"{clock.LIBRARY}\n", user="root")

    def firewall(self, on: bool) -> None:
        """ufw as Ubuntu's own guide sets it up: incoming denied except SSH, on at the next boot too; or off."""
        if on:
            self.run(["ufw", "allow", "22/tcp"], "root")
        self.run(["ufw", "--force", "enable" if on else "disable"], "root")
        if self._systemd:
            self.run(["systemctl", "enable" if on else "disable", "ufw.service"], "root")

    def take_subnet(self, address: str) -> None:
        """Put ``address`` (with prefix length) on an interface that is no part of the link: a Docker bridge."""
        if self.run(["ip", "link", "show", "docker0"], check=False).returncode:
            self.run(["ip", "link", "add", "name", "docker0", "type", "bridge"], "root")
            self.run(["ip", "link", "set", "docker0", "up"], "root")
        self.run(["ip", "addr", "add", address, "dev", "docker0"], "root")

    # How.

    @property
    def _systemd(self) -> bool:
        return self._machine.box.init == "systemd"

    def _console(self) -> str:
        return self._machine.console.read_text(errors="replace")[-1500:]

    def _until(self, true: Callable[[], object], timeout: float, what: str) -> None:
        try:
            eventually(true, timeout, f"{what} on {self.name}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self._console()}") from None

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.address} {'on' if self.on else 'off'}>"


def _process(folder: Path) -> Process:
    argv = (folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    try:
        program = os.readlink(folder / "exe")  # noqa: PTH115
    except OSError:
        program = ""
    return Process(int(folder.name), tuple(argv), program)


def _listens(process: Process) -> bool:
    return process.program.endswith("/sshd") and "[listener]" in process.argv[0]
