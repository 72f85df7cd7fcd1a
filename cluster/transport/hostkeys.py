"""Host keys: what known_hosts says of them, and the one way in which a new one gets there.

Read here and not by Paramiko, which stumbles over `@` markers, knows no wildcards, ignores revocations, and takes one key of a
type for a host's only one. The format: sshd(8), SSH_KNOWN_HOSTS FILE FORMAT.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import FailedError, RefusedError

_SYSTEM = (Path("/etc/ssh/ssh_known_hosts"), Path("/etc/ssh/ssh_known_hosts2"))


@dataclass(frozen=True)
class HostKey:
    """A host's public key; `host` as known_hosts names it (see `name_of`), `blob` as it crosses the wire."""

    host: str
    type: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it: SHA256:, base64 without padding."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    @property
    def line(self) -> str:
        """Its line in known_hosts."""
        return f"{self.host} {self.type} {base64.b64encode(self.blob).decode()}\n"

    def __str__(self) -> str:
        return f"{self.fingerprint} ({self.type})"


@dataclass(frozen=True)
class Known:
    """What known_hosts says of one host."""

    keys: tuple[HostKey, ...] = ()
    revoked: tuple[HostKey, ...] = ()


class UnknownHostKeyError(RefusedError):
    """Nothing is known of this host. `key` is what it offers: to be shown, asked about, and then given to `KnownHosts.accept`."""

    def __init__(self, node: str, key: HostKey) -> None:
        super().__init__(
            f"{node}: the host key of {key.host} is not known: {key}",
            "compare it with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the node, then accept it",
        )
        self.node = node
        self.key = key


class ChangedHostKeyError(RefusedError):
    """The host is known by another key, or this key is revoked. There is no way around it but to edit known_hosts."""


class KnownHosts:
    """The user's known_hosts and the system's."""

    def __init__(self, user: Path | None = None, system: tuple[Path, ...] = _SYSTEM) -> None:
        self._user = user or Path("~/.ssh/known_hosts").expanduser()
        self._files = (self._user, *system)

    def of(self, host: str) -> Known:
        """What is known of a host.

        Raises:
            FailedError: a file is there but cannot be read.
        """
        found = [parse(_read(file), host) for file in self._files]
        return Known(
            tuple(key for known in found for key in known.keys), tuple(key for known in found for key in known.revoked)
        )

    def check(self, node: str, offered: HostKey) -> None:
        """Return if this is a key that the host is known by.

        Raises:
            UnknownHostKeyError: the host is not known.
            ChangedHostKeyError: it is, by another key; or the key is revoked.
        """
        known = self.of(offered.host)
        if any(key.blob == offered.blob for key in known.revoked):
            raise ChangedHostKeyError(
                f"{node}: the host key of {offered.host} is revoked in known_hosts: {offered}",
                "give the host a new key, or find out who answers in its place",
            )
        if any(key.blob == offered.blob for key in known.keys):
            return
        if not known.keys:
            raise UnknownHostKeyError(node, offered)
        expected = next((key for key in known.keys if key.type == offered.type), known.keys[0])
        raise ChangedHostKeyError(
            f"{node}: the host key of {offered.host} has changed: known {expected}, offered {offered}",
            f"someone may be in between; if it was reinstalled: `ssh-keygen -R '{offered.host}'`, then again",
        )

    def accept(self, key: HostKey) -> None:
        """Add a key that the user has agreed to. Known ones are not added twice.

        Raises:
            FailedError: known_hosts cannot be written.
        """
        if any(known.blob == key.blob for known in self.of(key.host).keys):
            return
        try:
            self._user.parent.mkdir(mode=0o700, exist_ok=True)
            # One write to the end: another ssh may be adding a line of its own.
            descriptor = os.open(self._user, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, ("" if _ends_a_line(descriptor) else "\n").encode() + key.line.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise FailedError(
                f"{self._user}: {error.strerror}, so the host key of {key.host} is not saved", "mend that, then again"
            ) from None


def name_of(host: str, port: int) -> str:
    """How known_hosts names a host: with its port, if that is not 22."""
    return host if port == 22 else f"[{host}]:{port}"


def parse(text: str, host: str) -> Known:
    """The keys that known_hosts text gives for a host. Lines that make no sense are passed over, as ssh does.

    Lines of certificate authorities are too: a host that shows a certificate is known by its key or not at all.
    """
    keys: list[HostKey] = []
    revoked: list[HostKey] = []
    for line in text.splitlines():
        marker, fields = "", line.split()
        if fields and fields[0].startswith("@"):
            marker, *fields = fields
        if len(fields) < 3 or line.lstrip().startswith("#") or marker not in ("", "@revoked"):
            continue
        patterns, kind, encoded = fields[:3]
        if not _matches(patterns, host):
            continue
        try:
            key = HostKey(host, kind, base64.b64decode(encoded, validate=True))
        except binascii.Error:
            continue
        (revoked if marker else keys).append(key)
    return Known(tuple(keys), tuple(revoked))


def _matches(patterns: str, host: str) -> bool:
    if patterns.startswith("|1|"):
        return _matches_hash(patterns, host)
    verdicts = list(_verdicts(patterns, host.lower()))
    return bool(verdicts) and all(verdicts)


def _verdicts(patterns: str, host: str) -> Iterator[bool]:
    for pattern in patterns.lower().split(","):
        wanted = pattern.removeprefix("!")
        regex = re.escape(wanted).replace(r"\*", ".*").replace(r"\?", ".")
        if re.fullmatch(regex, host):
            yield not pattern.startswith("!")


def _matches_hash(entry: str, host: str) -> bool:
    # |1|salt|HMAC-SHA1 of the name, both in base64
    try:
        salt, digest = (base64.b64decode(part, validate=True) for part in entry.removeprefix("|1|").split("|"))
    except ValueError:
        return False
    return hmac.compare_digest(hmac.new(salt, host.encode(), hashlib.sha1).digest(), digest)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise FailedError(f"{path}: {error.strerror}", "host keys cannot be checked without it") from None


def _ends_a_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"
