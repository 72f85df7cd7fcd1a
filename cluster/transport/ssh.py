"""The transport over SSH: one connection to a node, reused, with few channels at once."""

from __future__ import annotations

import contextlib
import json
import selectors
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from cluster.errors import FailedError
from cluster.transport import FILE_LIMIT, OUTPUT_LIMIT, Home, Result, shipped
from cluster.transport.hostkeys import KnownHosts
from cluster.transport.process import ANSWER, Process, Session, bounded, communicate
from cluster.transport.sudo import Sudo, Tokens, become_root, elevated
from cluster.transport.tunnel import Tunnel

if TYPE_CHECKING:
    import fabric
    import paramiko

# sshd's MaxSessions is 10 by default; another program of the user's may share none of ours, but a node may be set lower.
CHANNELS = 6
_CHUNK = 1 << 16
_ERRAND_SECONDS = 60.0
_SLOT_SECONDS = 60.0
_REFUSED_SECONDS = 1.0


class SshTransport:
    """Speaks to sshd as OpenSSH's client does: ~/.ssh/config, known_hosts, agent and keys; never with a password.

    `patience` is how many seconds the node has to answer; a dead one takes no longer. Connects on first use, and anew when the
    connection was lost.
    """

    def __init__(
        self,
        name: str,
        host: str,
        *,
        user: str | None = None,
        port: int | None = None,
        identity_file: str | None = None,
        python: str = "python3",
        known_hosts: KnownHosts | None = None,
        patience: float = 8.0,
    ) -> None:
        self.name = name
        self._python = python
        self._host = host
        self._user = user
        self._port = port
        self._identity_file = identity_file
        self._known = known_hosts or KnownHosts()
        self._patience = patience
        self._connection: fabric.Connection | None = None
        self._connecting = threading.Lock()
        self._slots = threading.BoundedSemaphore(CHANNELS)
        self._tunnels: list[Tunnel] = []
        self._home: Home | None = None

    @property
    def python(self) -> str:
        """See Transport.python. No shell expands a `~` in it, so we do."""
        if self._python.startswith("~/"):
            home = self.run(["printenv", "HOME"]).stdout.decode(errors="replace").rstrip("\n").rpartition("\n")[2]
            self._python = home + self._python[1:]
        return self._python

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout: float = 60.0,
        limit: int = OUTPUT_LIMIT,
        sudo: Sudo | None = None,
    ) -> Result:
        """See Transport.run."""
        result = communicate(self._open(argv, sudo, limit, timeout), stdin, timeout)
        if result.status in (126, 127) and result.stderr.startswith(b"timeout: "):  # else the command itself says 127
            raise FailedError(f"{self.name}: {argv[0]}: not there, or not to be run", "install it, or correct the path")
        return result

    def session(self, argv: Sequence[str], *, sudo: Sudo | None = None) -> Session:
        """See Transport.session."""
        return Session(self._open(argv, sudo, OUTPUT_LIMIT))

    def put(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """See Transport.put."""
        self._errand(path, _order("put", path=path, mode=mode, size=len(data)) + data)

    def get(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """See Transport.get."""
        most = FILE_LIMIT if length is None else length
        order = _order("get", path=path, offset=offset, length=most)
        answer, data = self._errand(path, order, limit=most + OUTPUT_LIMIT)
        if len(data) != answer["size"]:
            raise FailedError(f"{self.name}: {path}: only {len(data)} of {answer['size']} bytes came", "try again")
        if length is None and answer["left"] > most:
            raise FailedError(f"{self.name}: {path}: larger than {FILE_LIMIT >> 20} MiB", "copy it another way")
        return data

    def start(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        """See Transport.start."""
        order = _order("start", argv=list(argv), log=log, env=None if env is None else dict(env))
        return int(self._errand(argv[0], order)[0]["pid"])

    def forward(self, port: int) -> int:
        """See Transport.forward."""
        self._connect()  # so that an unreachable node is told now and not to whoever connects

        def dial() -> Any:
            # These channels are no sessions: MaxSessions does not count them, so they take no slot.
            return self._connect().transport.open_channel("direct-tcpip", ("127.0.0.1", port), ("127.0.0.1", 0))

        tunnel = Tunnel(dial)
        self._tunnels.append(tunnel)
        return tunnel.port

    def home(self) -> Home:
        """See Transport.home."""
        if self._home is None:
            answer, _ = self._errand("its home folder", _order("home"))
            self._home = Home(str(answer["user"]), str(answer["sparkctl"]))
        return self._home

    def close(self) -> None:
        """See Transport.close."""
        from cluster.transport import dial

        while self._tunnels:
            self._tunnels.pop().close()
        with self._connecting:
            if self._connection is not None:
                dial.hang_up(self._connection)
                self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _errand(self, about: str, order: bytes, *, limit: int = OUTPUT_LIMIT) -> tuple[dict[str, Any], bytes]:
        """Have the node's Python do something; its answer and the data after it."""
        result = self.run(
            shipped.argv(self.python), stdin=order, timeout=_ERRAND_SECONDS + len(order) / 1e6, limit=limit
        )
        _, mark, rest = result.stdout.partition(ANSWER)
        line, _, data = rest.partition(b"\n")
        try:
            answer = json.loads(line) if mark else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._no_answer(result)
        if "error" in answer:
            path = answer.get("about") or about
            raise FailedError(f"{self.name}: {path}: {answer['error']}", "check the path and the free space")
        return answer, data

    def _no_answer(self, result: Result) -> NoReturn:
        said = result.stderr.decode(errors="replace").strip().splitlines()
        raise FailedError(
            f"{self.name}: {self.python}: did not answer{f': {said[-1][:200]}' if said else ''}",
            "log in there: does a shell without a terminal work, and Python?",
        )

    def _open(self, argv: Sequence[str], sudo: Sudo | None, limit: int, timeout: float | None = None) -> Process:
        command = list(argv) if timeout is None else bounded(argv, timeout)
        if sudo is None or self._connect().user == "root":
            return Process(self.name, argv, self._stream(command), limit=limit)
        tokens = Tokens.new()
        process = Process(self.name, argv, self._stream(elevated(command, tokens)), limit=limit)
        become_root(process, sudo, tokens)
        return process

    def _stream(self, argv: Sequence[str]) -> _Channel:
        if not self._slots.acquire(timeout=_SLOT_SECONDS):
            raise FailedError(f"{self.name}: all {CHANNELS} channels are busy", "wait for the other commands to end")
        try:
            channel = self._channel(shlex.join(argv))
        except BaseException:
            self._slots.release()
            raise
        return _Channel(self.name, channel, self._slots.release)

    def _channel(self, command: str) -> paramiko.Channel:
        """A channel on which `command` runs. A connection that turns out to be dead is replaced, once."""
        import paramiko

        transport, channel = self._session_on(self._connect().transport)
        if channel is None:
            transport, channel = self._session_on(self._connect().transport)
        if channel is None:
            raise self._lost()
        try:
            with _closing_after(transport, self._patience):
                channel.settimeout(self._patience)
                channel.exec_command(command)
        except (paramiko.SSHException, OSError, EOFError):
            channel.close()
            if transport.is_active():
                raise FailedError(
                    f"{self.name}: sshd refuses to run commands", "look for ForceCommand in its sshd_config"
                ) from None
            raise self._lost() from None
        return channel

    def _session_on(self, transport: paramiko.Transport) -> tuple[paramiko.Transport, paramiko.Channel | None]:
        """A channel of a connection; None if that is dead."""
        import paramiko

        deadline = time.monotonic() + _REFUSED_SECONDS
        while True:
            try:
                with _closing_after(transport, self._patience):
                    return transport, transport.open_session()
            except (paramiko.SSHException, OSError, EOFError):  # of two refused at once, one is told why
                if not transport.is_active():
                    return transport, None
                if time.monotonic() > deadline:
                    raise FailedError(
                        f"{self.name}: sshd refuses another session", "set `MaxSessions 10` in the node's sshd_config"
                    ) from None
                time.sleep(0.05)  # it counts one that we have closed until it has seen that

    def _lost(self) -> FailedError:
        return FailedError(f"{self.name}: the connection was lost", "is it on, and on this network?")

    def _connect(self) -> fabric.Connection:
        from cluster.transport import dial

        with self._connecting:
            if self._connection is not None and not self._connection.is_connected:
                dial.hang_up(self._connection)
                self._connection = None
            if self._connection is None:
                address = dial.Address(self.name, self._host, self._user, self._port, self._identity_file)
                self._connection = dial.dial(address, self._known, self._patience)
            return self._connection


class _Channel:
    """An SSH channel as a Stream."""

    def __init__(self, node: str, channel: paramiko.Channel, release: Callable[[], None]) -> None:
        self._node = node
        self._channel = channel
        self._release: Callable[[], None] | None = release
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)

    @property
    def ended(self) -> bool:
        channel = self._channel
        if channel.recv_ready() or channel.recv_stderr_ready():
            return False
        if channel.closed and channel.exit_status < 0 and not channel.eof_received:
            self._lost()  # sshd would have said that the outputs have ended
        return bool(channel.eof_received or channel.closed)

    def send(self, data: bytes) -> None:
        sent = 0
        with _quietly():
            while sent < len(data) and not self._channel.closed:
                # The command may leave its input alone for as long as it likes: a full window is no failure.
                with contextlib.suppress(TimeoutError):
                    sent += self._channel.send(data[sent : sent + _CHUNK])

    def close_stdin(self) -> None:
        with _quietly():
            self._channel.shutdown_write()

    def receive(self, timeout: float) -> tuple[bytes, bytes]:
        channel = self._channel
        if not (channel.recv_ready() or channel.recv_stderr_ready() or channel.eof_received or channel.closed):
            self._selector.select(timeout)
        out = channel.recv(_CHUNK) if channel.recv_ready() else b""
        err = channel.recv_stderr(_CHUNK) if channel.recv_stderr_ready() else b""
        return out, err

    def status(self, timeout: float) -> int | None:
        if not self._channel.status_event.wait(timeout):
            return None
        if self._channel.exit_status < 0 and not self._channel.get_transport().is_active():
            self._lost()
        return int(self._channel.exit_status)

    def kill(self) -> None:
        """Ask sshd to end the command's process group (RFC 4254, 6.9). Paramiko has no call for it."""
        import paramiko

        request = paramiko.Message()
        request.add_byte(bytes([98]))  # SSH_MSG_CHANNEL_REQUEST
        request.add_int(self._channel.remote_chanid)
        request.add_string("signal")
        request.add_boolean(False)  # no reply wanted
        request.add_string("KILL")
        with _quietly():
            if not self._channel.closed:
                self._channel.get_transport()._send_user_message(request)  # type: ignore[attr-defined]

    def close(self) -> None:
        if self._release is not None:
            self._selector.close()
            with _quietly():
                self._channel.close()
            self._release()
            self._release = None

    def _lost(self) -> NoReturn:
        raise FailedError(f"{self._node}: the connection was lost", "is it on, and on this network?")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Pass over that the connection is gone: whoever waits for an answer learns of it."""
    import paramiko

    with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
        yield


def _order(what: str, **arguments: object) -> bytes:
    """The standard input for one errand; data may follow."""
    return shipped.modules(["cluster.transport.errand"]) + json.dumps([what, arguments]).encode() + b"\n"


@contextlib.contextmanager
def _closing_after(transport: paramiko.Transport, seconds: float) -> Iterator[None]:
    """Close the transport if the block takes longer: Paramiko waits without end for some answers."""
    timer = threading.Timer(seconds, transport.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
