"""Reaching a node's sshd: the socket, the host key, the user's keys, each failure told apart, none of them for long.

Fabric brings ~/.ssh/config (aliases, ProxyJump, IdentityFile) and Paramiko the protocol. What Fabric would do and we do not: accept
unknown host keys, forward the agent, read passwords out of its own configuration files.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fabric
import paramiko

from cluster.errors import FailedError, SparkctlError
from cluster.transport.hostkeys import HostKey, KnownHosts, name_of

# A refused connection must not end in Paramiko's traceback on stderr: what it logs is told by our errors.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

# As the inventory takes it: nothing that ~/.ssh/config could hand on to a shell (Match exec, ProxyCommand).
_HOST = re.compile(r"[A-Za-z0-9:][A-Za-z0-9._:%-]{0,252}")
_DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
# Seconds of silence after which a connection counts as dead. Keepalives ask after half of that.
DEAD_AFTER = 8


@dataclass(frozen=True)
class Address:
    """Who is meant, and with which key; None leaves it to ~/.ssh/config, then to ssh's defaults."""

    name: str
    host: str
    user: str | None = None
    port: int | None = None
    identity_file: str | None = None


def dial(address: Address, known: KnownHosts, patience: float) -> fabric.Connection:
    """An open connection.

    Args:
        patience: seconds for the node to answer, and again to prove its identity; logging in may take twice as long.

    Raises:
        UnknownHostKeyError, ChangedHostKeyError: see KnownHosts.check.
        FailedError: any other way in which it can fail, with what was seen and what to do.
    """
    if not _HOST.fullmatch(address.host):
        raise FailedError(f"{address.name}: {address.host!r} is no host name or address", "correct `host`")
    try:
        config = fabric.Config(lazy=True)  # lazy: without Fabric's own configuration files, which may hold a password
        config.load_ssh_config()
        connection = fabric.Connection(
            address.host, user=address.user, port=address.port, config=config, forward_agent=False
        )
    except (paramiko.ConfigParseError, OSError, ValueError) as error:
        raise FailedError(f"{address.name}: ~/.ssh/config: {_clean(error)}", "correct it") from None
    try:
        _open(_Call(address, connection, known, patience))
    except BaseException:
        hang_up(connection)
        raise
    return connection


def hang_up(connection: fabric.Connection) -> None:
    """Close a connection and those it goes through."""
    hop: Any = connection
    while isinstance(hop, fabric.Connection):
        with contextlib.suppress(Exception):  # whatever a broken connection says when it is closed
            hop.client.close()
        hop = hop.gateway


@dataclass(frozen=True)
class _Call:
    address: Address
    connection: fabric.Connection
    known: KnownHosts
    patience: float

    @property
    def where(self) -> str:
        return name_of(self.connection.host, self.connection.port)


def _open(call: _Call) -> None:
    connection = call.connection
    identity = _Identity(call)
    sock: dict[str, object] = {}
    if isinstance(connection.gateway, fabric.Connection):
        connection.gateway.forward_agent = False
        hop = Address(call.address.name, connection.gateway.host)
        _open(_Call(hop, connection.gateway, call.known, call.patience))
    elif connection.gateway is None:
        sock = {"sock": _socket(call)}
    connection.connect_kwargs = {
        **sock,
        "timeout": call.patience,
        "banner_timeout": call.patience,
        "auth_timeout": 2 * call.patience,
        "channel_timeout": call.patience,
        "auth_strategy": identity,
        "transport_factory": lambda sock, **options: _transport(sock, call, options),
    }
    connection.connect_timeout = None  # ours counts
    connection.client.set_missing_host_key_policy(identity)
    deadline = _Deadline(connection)
    identity.deadline = deadline
    try:
        with deadline.within(call.patience):
            connection.open()
    except SparkctlError:
        raise
    except Exception as error:  # Paramiko raises what it meets: SSHException, OSError, EOFError, ValueError
        raise _refusal(call, error, identity, expired=deadline.expired) from None
    connection.transport.set_keepalive(DEAD_AFTER // 2)


def _socket(call: _Call) -> socket.socket:
    host, port = call.connection.host, call.connection.port
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        sock = socket.create_connection((host, port), timeout=call.patience / len(addresses))
    except (OSError, UnicodeError) as error:
        raise _unreachable(call, error) from None
    # A node that loses power says nothing; without these a read from it would wait for ever, and an unanswered write 15 minutes.
    options = (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),  # 48 ms a command without, 14 ms with
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", DEAD_AFTER // 2),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 2),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 2),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", DEAD_AFTER * 1000),
    )
    for level, option, value in options:
        if hasattr(socket, option):  # macOS lacks some; Paramiko's own keepalive and our deadlines remain
            sock.setsockopt(level, getattr(socket, option), value)
    return sock


def _transport(sock: Any, call: _Call, options: dict[str, Any]) -> paramiko.Transport:
    """Asks for the types of key first that the host is known by, or it would offer another and look changed."""
    transport = paramiko.Transport(sock, **options)
    known = {key.type for key in call.known.of(call.where).keys}
    if "ssh-rsa" in known:
        known |= {"rsa-sha2-512", "rsa-sha2-256"}  # the same key, signing with a hash that still counts
    security = transport.get_security_options()
    security.key_types = tuple(sorted(security.key_types, key=lambda kind: kind not in known))
    return transport


@dataclass
class _Deadline:
    """Closes the connection when its time is over, whatever Paramiko is waiting for then."""

    connection: fabric.Connection
    expired: bool = False
    _timer: threading.Timer | None = None

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        self.extend(seconds)
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def extend(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _expire(self) -> None:
        self.expired = True
        self.connection.client.close()


@dataclass
class _Identity(paramiko.MissingHostKeyPolicy):
    """Whether it is the host, then whether we may log in: Paramiko asks in this order.

    Paramiko finds no host key known, since it is given none, so `missing_host_key` judges every one.
    """

    call: _Call
    deadline: _Deadline | None = None
    verified: bool = False
    tried: list[str] = field(default_factory=list)

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        self.call.known.check(self.call.address.name, HostKey(self.call.where, key.get_name(), key.asbytes()))
        self.verified = True
        if self.deadline is not None:
            self.deadline.extend(2 * self.call.patience)

    def authenticate(self, transport: paramiko.Transport) -> None:
        """Try the given key, the agent's, the default ones. Never a password."""
        failure: Exception = paramiko.SSHException("no key")
        for key, origin in self._keys():
            self.tried.append(origin)
            try:
                if not transport.auth_publickey(self.call.connection.user, key):
                    return
                failure = paramiko.SSHException("a key is not enough for it")
            except (paramiko.SSHException, ValueError) as error:
                failure = error
            if not transport.is_active():
                break
        raise failure

    def _keys(self) -> Iterator[tuple[paramiko.PKey, str]]:
        offered: set[bytes] = set()
        agent = paramiko.Agent()
        try:
            from_agent = [(key, "the agent's keys") for key in agent.get_keys()]
            given, default = self._paths()
            for key, origin in (*self._load(given), *from_agent, *self._load(default)):
                if key.asbytes() not in offered:
                    offered.add(key.asbytes())
                    yield key, origin
        finally:
            agent.close()

    def _paths(self) -> tuple[list[str], list[str]]:
        if self.call.address.identity_file is not None:
            path = Path(self.call.address.identity_file).expanduser()
            if not path.is_file():
                raise FailedError(f"{self.call.address.name}: {path}: no such key", "correct `identity_file`")
            given = [str(path)]
        else:
            named = [Path(name).expanduser() for name in self.call.connection.ssh_config.get("identityfile", [])]
            given = [str(path) for path in named if path.is_file()]
        folder = Path("~/.ssh").expanduser()
        return given, [str(folder / name) for name in _DEFAULT_KEYS if (folder / name).is_file()]

    def _load(self, paths: list[str]) -> Iterator[tuple[paramiko.PKey, str]]:
        for path in paths:
            try:
                yield paramiko.PKey.from_path(path), path
            except (TypeError, paramiko.PasswordRequiredException):  # cryptography says TypeError
                self.tried.append(f"{path} (locked by a passphrase: ssh-add it)")
            except Exception as error:  # whatever a damaged file makes the libraries say
                self.tried.append(f"{path} (unreadable: {type(error).__name__})")


def _unreachable(call: _Call, error: OSError | UnicodeError) -> FailedError:
    what = f"{call.address.name}: {call.where}"
    if isinstance(error, socket.gaierror | UnicodeError):
        return FailedError(f"{what}: no such host name", "correct `host`, or give the address")
    if isinstance(error, TimeoutError):
        return FailedError(f"{what}: no answer within {call.patience:g} s", "is it on, and on this network?")
    if isinstance(error, ConnectionRefusedError):
        return FailedError(f"{what}: connection refused", "on the node: `sudo systemctl enable --now ssh`")
    return FailedError(f"{what}: {_clean(error)}", "is it on, and on this network?")


def _refusal(call: _Call, error: Exception, identity: _Identity, *, expired: bool) -> FailedError:
    what = f"{call.address.name}: {call.where}"
    if expired:
        return FailedError(
            f"{what}: accepts connections but does not {'let us log in' if identity.verified else 'answer as an SSH server'}"
            f" within {call.patience * (2 if identity.verified else 1):g} s",
            "on the node: `sudo systemctl restart ssh`",
        )
    if identity.verified:
        tried = ", ".join(dict.fromkeys(identity.tried)) or "no key here, and no agent"
        return FailedError(
            f"{call.address.name}: {call.connection.user}@{call.where}: not let in ({_clean(error)}); tried: {tried}",
            f"`ssh-copy-id -p {call.connection.port} {call.connection.user}@{call.connection.host}` gives it your key",
        )
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
        return FailedError(f"{what}: {_clean(error)}", "update its OpenSSH")
    if call.connection.gateway is not None and not isinstance(error, paramiko.SSHException):
        return FailedError(f"{what}: {_clean(error)}", "see ProxyJump and ProxyCommand in ~/.ssh/config")
    if isinstance(error, paramiko.ChannelException):
        return FailedError(f"{what}: not to be reached through {call.connection.gateway.host}", "see ProxyJump")
    return FailedError(
        f"{what}: does not answer as an SSH server ({_clean(error)})",
        "correct `host` and `port`, or look at its sshd's log",
    )


def _clean(error: Exception) -> str:
    """What the other side may have put into an error's text must not play with the terminal, nor fill it."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return "".join(c if c.isprintable() else " " for c in text).strip()[:120]
