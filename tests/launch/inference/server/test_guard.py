"""The guard alone: bodies are bounded in size and time, whatever their headers say; and only these addresses are ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from launch.inference.server import guard
from launch.inference.server.errors import ApiError
from launch.inference.server.guard import Door, Guard

DOOR = Door("secret", frozenset({"192.168.1.21"}))
HEADERS = {"host": "127.0.0.1:8000", "authorization": "Bearer secret", "content-type": "application/json"}


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body's size; then says whether the client is still there."""
    message = await receive()
    assert not message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(message["body"])).encode()})


def post(pieces: Iterator[Any], *, largest: int = 1000) -> tuple[int, bytes]:
    """Send a body in these pieces; a float waits so many seconds, None goes away. Returns status (0: nothing) and body."""
    sent: list[Any] = []
    waiting = list(pieces)

    async def receive() -> Any:
        piece = waiting.pop(0)
        if isinstance(piece, float):
            await asyncio.sleep(piece)
            piece = waiting.pop(0)
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(name.encode(), value.encode()) for name, value in HEADERS.items()],
    }
    asyncio.run(Guard(echo, DOOR, largest=largest)(scope, receive, send))
    return (sent[0]["status"], sent[1]["body"]) if sent else (0, b"")


def test_a_body_is_put_together_and_handed_on() -> None:
    assert post(iter([b"x" * 10, b"y" * 20, b""])) == (200, b"30")


def test_a_body_without_a_length_is_bounded_too() -> None:
    status, body = post(iter([b"x" * 600] * 5))
    assert status == 413
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_WITHIN", 0.05)
    assert post(iter([b"x", 30.0, b"y"]))[0] == 408


def test_who_goes_away_in_the_middle_is_not_answered() -> None:
    assert post(iter([b"x", None])) == (0, b"")


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1:80", True),
        ("localhost", True),
        ("LOCALHOST:9", True),
        ("[::1]:80", True),
        ("127.9.9.9", True),
        ("192.168.1.21:8000", True),
        ("192.168.1.22:8000", False),
        ("localhost.evil.example", False),
        ("evil.example", False),
        ("", False),
        ("[", False),
        ("2130706433", False),
    ],
)
def test_only_our_addresses_are_ours(host: str, known: bool) -> None:
    assert DOOR.knows(host) == known


def test_the_open_paths_need_no_key_but_our_address() -> None:
    DOOR.check("GET", "/health", {"host": "127.0.0.1"})
    with pytest.raises(ApiError, match="evil"):
        DOOR.check("GET", "/health", {"host": "evil.example"})
    with pytest.raises(ApiError, match="no key"):
        DOOR.check("GET", "/metrics", {"host": "127.0.0.1"})
