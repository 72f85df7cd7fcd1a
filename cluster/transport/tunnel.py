"""A port on this machine's loopback that leads through a connection to a port on the node's.

Fabric's own (`forward_local`) is not listening yet when it returns, and ends for good when one connection finds nobody there.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

_CHUNK = 1 << 16


class Tunnel:
    """Listens from the moment it is made until `close`. `dial` opens a channel to the node's port, or raises; `port` 0 is any."""

    def __init__(self, dial: Callable[[], Any], *, port: int = 0) -> None:
        self._dial = dial
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections. Those that are open end with the SSH connection."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near:
            try:
                far = self._dial()
            except Exception:  # nobody there, or no connection any more: the caller sees its own closed
                return
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=_pump, args=(far, near), daemon=True)
            back.start()
            _pump(near, far)
            back.join()
            far.close()


def _pump(source: Any, sink: Any) -> None:
    """Carry bytes one way until they end, then say so to the other side, which may still have something to say."""
    with contextlib.suppress(OSError, EOFError):
        while piece := source.recv(_CHUNK):
            sink.sendall(piece)
    with contextlib.suppress(OSError, EOFError):
        sink.shutdown(socket.SHUT_WR)
