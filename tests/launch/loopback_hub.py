"""A hub on loopback: serves folders as huggingface.co serves models, range requests and refusals included."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`models` are folders by OWNER/NAME; `gated` answers with a status instead. `asked` are the requests that came."""

    models: dict[str, Path] = field(default_factory=dict)
    gated: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    sent: int = 0  # bytes of bodies
    endpoint: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            """Nothing."""

        def _answer(self, *, body: bool) -> None:
            hub.asked.append((self.command, self.path, self.headers.get("range", "")))
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)", self.path)
            repository = found[1] if found else ""
            if repository in hub.gated:
                return self._refuse(hub.gated[repository], "GatedRepo")
            if found is None or repository not in hub.models:
                return self._refuse(401, "RepoNotFound")
            path = hub.models[repository] / found[3]
            if not path.is_file():
                return self._refuse(404, "EntryNotFound")
            data, status = path.read_bytes(), 200
            size = len(data)
            if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", "")):
                data, status = data[int(part[1]) : int(part[2]) + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(path.name.encode(), usedforsecurity=False).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            if status == 206 and part:
                self.send_header("Content-Range", f"bytes {part[1]}-{int(part[1]) + len(data) - 1}/{size}")
            self.end_headers()
            if body:
                hub.sent += len(data)
                self.wfile.write(data)
            return None

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
