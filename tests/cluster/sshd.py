"""A real sshd on a loopback port, with keys, configuration and a client's home folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRAM = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
MISSING = None if PROGRAM else "openssh-server is not installed"


class Sshd:
    """Lets in the key `home/.ssh/id_ed25519`; its own is `host_key`. A context manager: everything it started ends with it.

    Args:
        folder: an empty folder for its files.
        environment: what a session finds in its environment. (SHLVL keeps bash from reading this machine's ~/.bashrc.)
        options: lines for sshd_config.
        disk: MiB of a tmpfs of its own that sessions find at `folder / "disk"`, and nobody else does. Needs root.
    """

    def __init__(
        self, folder: Path, *, environment: Mapping[str, str] | None = None, options: str = "", disk: int | None = None
    ) -> None:
        self.folder = folder
        self.port = _free_port()
        self.home = folder / "home"
        self.known_hosts = self.home / ".ssh" / "known_hosts"
        self.authorized_keys = folder / "authorized_keys"
        self.host_key = folder / "host_key"
        self.disk = folder / "disk"
        self._size = disk
        self._log = folder / "log"
        self._daemon: subprocess.Popen[bytes] | None = None
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        make_key(self.host_key)
        make_key(self.home / ".ssh" / "id_ed25519")
        shutil.copy(self.home / ".ssh" / "id_ed25519.pub", self.authorized_keys)
        self.known_hosts.write_text(self.known_line())
        quoted = (f'{name}="{value}"' for name, value in ({"SHLVL": "5"} | dict(environment or {})).items())
        (folder / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.host_key}\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
            f"AuthorizedKeysFile {self.authorized_keys}\nLogLevel VERBOSE\n{options}\n"
            f"SetEnv {' '.join(quoted)}\n"
        )

    def known_line(self, key: Path | None = None) -> str:
        """The line of known_hosts that is true of it, or would be if `key` were its key."""
        public = (key or self.host_key).with_suffix(".pub").read_text().split()[:2]
        return f"[127.0.0.1]:{self.port} {' '.join(public)}\n"

    def start(self) -> None:
        """Start it and wait until it listens."""
        assert PROGRAM
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)  # its privilege separation wants it
        with self._log.open("ab") as log:
            argv = [PROGRAM, "-D", "-e", "-f", str(self.folder / "config")]
            if self._size is not None:
                mount = f'mount -t tmpfs -o size={self._size}m tmpfs "$0" && exec "$@"'
                self.disk.mkdir(exist_ok=True)
                argv = ["unshare", "--mount", "sh", "-c", mount, str(self.disk), *argv]
            self._daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + 5
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except ConnectionRefusedError:
                assert self._daemon.poll() is None and time.monotonic() < end, self.log()
                time.sleep(0.01)
            else:
                return

    def stop(self, *, sessions: bool = True) -> None:
        """Kill it, and unless `sessions` is False the connections that it has open."""
        if self._daemon is not None:
            children = list(_sshds_under(self._daemon.pid)) if sessions else []
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = None
            for child in children:
                _kill(child)

    def freeze(self) -> list[int]:
        """Stop it and its connections in their tracks, as a host that hangs; returns the process ids, for SIGCONT."""
        assert self._daemon is not None
        pids = [self._daemon.pid, *_sshds_under(self._daemon.pid)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return pids

    def connections(self) -> int:
        """How many logins it has let in since it was made."""
        return self.log().count("Accepted publickey")

    def log(self) -> str:
        """What it said."""
        return self._log.read_text(errors="replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def make_key(path: Path, *, kind: str = "ed25519", passphrase: str = "") -> None:
    """A key pair at `path` and `path`.pub."""
    size = ["-b", "2048"] if kind == "rsa" else []
    subprocess.run(["ssh-keygen", "-q", "-t", kind, *size, "-N", passphrase, "-f", path], check=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _sshds_under(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text().startswith("sshd"):
            yield int(child)
            yield from _sshds_under(int(child))


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
