"""A hub on loopback: serves folders as huggingface.co serves models, range requests and refusals included."""

from __future__ import annotations

import hashlib
import json
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
    tokens: list[tuple[str, str]] = field(default_factory=list)  # path, what stood in Authorization
    sent: int = 0  # bytes of bodies
    sends_on: bool = False  # large files are had elsewhere, as on the real one: /elsewhere/...
    breaks_off: int = 0  # so many answers end in their middle
    private: str = ""  # the token that it takes to read anything
    endpoint: str = ""


@contextmanager
def serving(hub: Hub, address: str = "127.0.0.1") -> Iterator[Hub]:
    """Serve while the block runs."""
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            if listed := re.fullmatch(r"/api/models/([^/]+/[^/]+)\?blobs=(?:true|1)", self.path, re.IGNORECASE):
                hub.tokens.append((self.path, self.headers.get("authorization", "")))
                self._list(listed[1])
            else:
                self._answer(body=True)

        def log_message(self, *_: object) -> None:
            """Nothing."""

        def _answer(self, *, body: bool) -> None:
            hub.asked.append((self.command, self.path, self.headers.get("range", "")))
            hub.tokens.append((self.path, self.headers.get("authorization", "")))
            found = re.fullmatch(r"(?:/elsewhere)?/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)", self.path)
            repository = found[1] if found else ""
            elsewhere = self.path.startswith("/elsewhere/")
            if hub.private and not elsewhere and self.headers.get("authorization") != f"Bearer {hub.private}":
                return self._refuse(401, "RepoNotFound")
            if repository in hub.gated:
                return self._refuse(hub.gated[repository], "GatedRepo")
            if found is None or repository not in hub.models:
                return self._refuse(401, "RepoNotFound")
            path = hub.models[repository] / found[3]
            if not path.is_file():
                return self._refuse(404, "EntryNotFound")
            if hub.sends_on and not elsewhere and path.suffix == ".safetensors":
                self.send_response(302)
                self.send_header("Location", f"{hub.endpoint.replace('127.0.0.1', 'localhost')}/elsewhere{self.path}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
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
                with turn:
                    breaks = hub.breaks_off > 0 and len(data) > 1 << 16
                    hub.breaks_off -= breaks
                if breaks:
                    data, self.close_connection = data[: len(data) // 2], True
                hub.sent += len(data)
                self.wfile.write(data)
            return None

        def _list(self, repository: str) -> None:
            if repository in hub.gated:
                return self._refuse(hub.gated[repository], "GatedRepo")
            if repository not in hub.models:
                return self._refuse(401, "RepoNotFound")
            siblings = []
            for path in sorted(hub.models[repository].iterdir()):
                data = path.read_bytes()
                entry = {
                    "rfilename": path.name,
                    "size": len(data),
                    "blobId": hashlib.sha1(data, usedforsecurity=False).hexdigest(),
                }
                if path.suffix == ".safetensors":
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                siblings.append(entry)
            body = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return None

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer((address, 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://{address}:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
