"""Talks to an endpoint as the command line does: chat, streamed; whether it is ready. Standard library only: it starts at once."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import FailedError, RefusedError, SparkctlError, WrongInputError

# Seconds between two pieces of an answer: a long prompt on a large model takes minutes before the first.
PATIENCE = 900.0


@dataclass(frozen=True)
class Piece:
    """What one event of a stream brought."""

    text: str = ""
    thought: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass
class Client:
    """One endpoint, reached at a loopback port."""

    host: str
    port: int
    key: str = field(repr=False)

    def ready(self) -> bool:
        """Whether it answers requests."""
        try:
            with self._request("GET", "/health/ready", timeout=5) as response:
                return response.status == 200
        except FailedError:
            return False

    def models(self) -> tuple[str, ...]:
        """The names that it serves."""
        with self._request("GET", "/v1/models", timeout=30) as response:
            return tuple(model["id"] for model in _document(response)["data"])

    def figures(self) -> dict[str, float]:
        """Those of /metrics that have no labels."""
        with self._request("GET", "/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines() if response.status == 200 else []
        return {
            line.split()[0]: float(line.split()[1]) for line in lines if "{" not in line and not line.startswith("#")
        }

    def chat(self, messages: Sequence[Mapping[str, str]], *, model: str, **sampling: Any) -> Iterator[Piece]:
        """Ask, and yield the answer as it comes; leaving the iterator early ends the answer on the server too.

        Raises:
            WrongInputError: the server refuses the question. RefusedError: it has no room now. FailedError: it cannot be reached,
                or fails.
        """
        body = {
            **{name: value for name, value in sampling.items() if value is not None},
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with self._request("POST", "/v1/chat/completions", body, timeout=PATIENCE) as response:
            for event in _events(response):
                yield _piece(event)

    def complete(self, prompt: Sequence[int], *, model: str, tokens: int) -> Iterator[Piece]:
        """Have exactly so many tokens generated after a prompt of token ids; yields a piece for each that comes.

        Raises:
            WrongInputError, RefusedError, FailedError: as `chat`.
        """
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with self._request("POST", "/v1/completions", body, timeout=PATIENCE) as response:
            for event in _events(response):
                yield _piece(event)

    @contextmanager
    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout: float
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        headers = {"Authorization": f"Bearer {self.key}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
            response = connection.getresponse()
            if response.status >= 400 and method == "POST":
                raise _refusal(response)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise FailedError(
                f"the endpoint at {self.host}:{self.port} does not answer ({type(error).__name__})",
                "`sparkctl jobs` shows whether the job still runs",
            ) from None
        finally:
            connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise FailedError(f"the server ended the answer: {event['error']['message']}", "ask again")
            yield dict(event)
    raise FailedError("the connection was lost before the answer's end", "ask again")


def _piece(event: Mapping[str, Any]) -> Piece:
    usage = event.get("usage") or {}
    counts = {"prompt_tokens": usage.get("prompt_tokens", 0), "tokens": usage.get("completion_tokens", 0)}
    if not event["choices"]:
        return Piece(**counts)
    choice = event["choices"][0]
    delta = choice.get("delta", {})
    return Piece(
        text=delta.get("content") or choice.get("text") or "",
        thought=delta.get("reasoning_content") or "",
        finish_reason=choice.get("finish_reason") or "",
        **counts,
    )


def _document(response: http.client.HTTPResponse) -> dict[str, Any]:
    if response.status >= 400:
        raise _refusal(response)
    return dict(json.loads(response.read()))


def _refusal(response: http.client.HTTPResponse) -> SparkctlError:
    try:
        message = str(json.loads(response.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.reason
    if response.status in (429, 503):
        return RefusedError(f"the server has no room now: {message}", "ask again in a moment")
    if response.status >= 500:
        return FailedError(f"the server failed: {message}", "look at `sparkctl logs JOB`")
    return WrongInputError(f"the server refuses: {message}", "change the question or its options")
