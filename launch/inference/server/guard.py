"""Who may ask: checked before anything of a request is read.

Loopback is not safe from browsers and other local users. A page of any site can make a browser send requests to 127.0.0.1, under
a name of its own that resolves there (DNS rebinding): so the Host header must be an address of ours, a foreign Origin is
refused, bodies must say that they are JSON (no form can), and no CORS header is ever sent. Other users lack the key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from launch.inference.server.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# A conversation of a million tokens is about 4 MB of text, and JSON may write a character in six.
LARGEST_BODY = 32 << 20
# Seconds between two pieces of a body.
BODY_WITHIN = 30.0
# Answer without a key: they hold nothing of the job's, and whoever watches a service must not need its secret.
OPEN_PATHS = frozenset({"/", "/page.css", "/page.js", "/favicon.ico", "/health", "/health/live", "/health/ready"})


@dataclass(frozen=True)
class Door:
    """What a request must show: the job's key, and one of the names under which this endpoint may be reached."""

    key: str
    hosts: frozenset[str]

    def check(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Let a request pass, or say why not.

        Raises:
            ApiError: 401, 403 or 415.
        """
        host = headers.get("host", "")
        if not self.knows(host):
            raise ApiError(
                403, f"the Host header names {host[:100]!r}, which is not this endpoint's address", code="wrong_host"
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(403, "requests of other sites' pages are not answered", code="wrong_origin")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and path not in OPEN_PATHS:
            raise ApiError(403, "requests of other sites' pages are not answered", code="wrong_origin")
        if path not in OPEN_PATHS and not self.opens(headers.get("authorization", "")):
            raise ApiError(
                401,
                "no key, or a wrong one: `sparkctl tunnel JOB` prints it; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            raise ApiError(415, "the body must be JSON, and say so: Content-Type: application/json")

    def knows(self, host: str) -> bool:
        """Whether a Host header names this endpoint: loopback, whatever the port (a tunnel has its own), or a configured name."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name == "localhost" or name in self.hosts:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def opens(self, authorization: str) -> bool:
        """Whether the header bears the key; takes as long for a wrong one as for the right one."""
        scheme, _, given = authorization.partition(" ")
        right = hmac.compare_digest(given.strip().encode(errors="replace"), self.key.encode())
        return right and scheme.lower() == "bearer"


class Guard:
    """Stands before the whole application; bounds what it reads, too."""

    def __init__(self, app: App, door: Door, *, largest: int = LARGEST_BODY) -> None:
        self._app = app
        self._door = door
        self._largest = largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (ASGI 3)."""
        if scope["type"] != "http":
            await (self._app(scope, receive, send) if scope["type"] == "lifespan" else _close(send))
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._door.check(scope["method"], scope["path"], headers)
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length[:20]) > self._largest:
                raise _too_large(self._largest)
            body = await self._read(receive) if scope["method"] == "POST" else b""
        except ApiError as error:
            await _answer(send, error)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None where the client went away."""
        pieces: list[bytes] = []
        size = 0
        while True:
            try:
                message = await asyncio.wait_for(receive(), BODY_WITHIN)
            except TimeoutError:
                raise ApiError(408, f"the rest of the body did not come within {BODY_WITHIN:g} s") from None
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._largest:
                raise _too_large(self._largest)
            if not message.get("more_body"):
                return b"".join(pieces)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _too_large(largest: int) -> ApiError:
    return ApiError(413, f"the body is larger than {largest >> 20} MiB")


async def _answer(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "connection": "close", **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _close(send: Send) -> None:
    await send({"type": "websocket.close", "code": 1008})
