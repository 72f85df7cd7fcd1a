"""Requests handed to the engine, and its events back on the event loop.

The engine calls from its own thread; each event crosses to the loop by `call_soon_threadsafe` and waits there in one queue for all
answers of one HTTP request. Whoever stops listening cancels what still runs, which frees its slot within one step.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from launch.inference.intake import Draining, Event, Failed, Finished, QueueFull, Scored, Tokens, TooLong
from launch.inference.request import GenerationRequest, Sampling
from launch.inference.server import replies
from launch.inference.server.errors import ApiError, bad
from launch.inference.server.replies import Usage
from launch.inference.server.service import Service
from launch.inference.server.shapes import ChatRequest, CompletionRequest

# What a client whom the queue has no room for is told to wait, in seconds.
RETRY_AFTER = "1"


@dataclass(frozen=True)
class Piece:
    """What one step brought an answer: text, which may be none yet, and its tokens where their scores were asked for."""

    text: str
    scored: Sequence[Scored] = ()


@dataclass(frozen=True)
class End:
    """An answer has ended, and why, in OpenAI's words."""

    reason: str


@dataclass
class _Clock:
    """When the tokens of one answer came, in seconds after the request."""

    tokens: int = 0
    first: float | None = None
    last: float = 0.0


def prepare(
    service: Service,
    wanted: ChatRequest | CompletionRequest,
    prompt: Sequence[int],
    *,
    adapter: str | None,
    longest: int | None,
    logprobs: int | None,
    echo: bool = False,
) -> Callable[[int], GenerationRequest]:
    """Makes the engine's request for each of a prompt's answers; they differ in their seeds alone."""
    room = service.max_model_len - len(prompt)
    if room < 1 or (longest or 0) > room:
        asked = f" and {longest} for the answer" if longest else ""
        raise ApiError(
            400,
            f"at most {service.max_model_len} tokens fit, prompt and answer together; this has {len(prompt)} in the prompt{asked}",
            param="messages" if isinstance(wanted, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    if wanted.logit_bias:
        raise bad("logit_bias", "is not supported")
    seed = service.new_seed() if wanted.seed is None else wanted.seed % 2**53
    defaults = service.defaults

    def of(value: Any, default: Any) -> Any:
        return default if value is None else value

    def one(index: int) -> GenerationRequest:
        return GenerationRequest(
            id=secrets.token_hex(8),
            prompt=tuple(prompt),
            max_tokens=longest or room,
            adapter=adapter,
            prompt_logprobs=logprobs if echo else None,
            sampling=Sampling(
                temperature=of(wanted.temperature, defaults.temperature),
                top_p=of(wanted.top_p, defaults.top_p),
                top_k=max(0, of(wanted.top_k, defaults.top_k)),
                min_p=of(wanted.min_p, defaults.min_p),
                repetition_penalty=of(wanted.repetition_penalty, defaults.repetition_penalty),
                presence_penalty=of(wanted.presence_penalty, 0.0),
                frequency_penalty=of(wanted.frequency_penalty, 0.0),
                seed=(seed + index) % 2**53,
                stop=wanted.stop or (),
                stop_token_ids=wanted.stop_token_ids or (),
                ignore_eos=wanted.ignore_eos,
                logprobs=logprobs,
            ),
            keep_special=service.speaks_in_channels and isinstance(wanted, ChatRequest),
        )

    return one


class Asked:
    """The answers to one HTTP request, as they come: `async for index, event in asked`.

    Raises:
        ApiError: the engine refuses one of them: 400 it is too long, 429 the queue is full, 503 the server drains. Then none runs.
    """

    def __init__(self, service: Service, requests: Sequence[GenerationRequest], *, choices: int) -> None:
        self.usage = Usage(prompt=sum(len(request.prompt) for request in requests) // choices)
        self._service = service
        self._requests = requests
        self._open: dict[str, int] = {}
        self._queue: asyncio.Queue[Event | ApiError | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._began = time.monotonic()
        self._clocks = [_Clock() for _ in requests]
        service.open.add(self)
        try:
            for index, request in enumerate(requests):
                service.intake.submit(request, self._on_event)
                self._open[request.id] = index
        except (TooLong, QueueFull, Draining) as error:
            self.close()
            raise _refusal(error) from None

    def _on_event(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    def close(self) -> None:
        """Cancel what still runs; harmless once all has ended."""
        for request, index in list(self._open.items()):
            self._service.intake.cancel(request)
            self._count(request, index, "cancelled")
        self._service.open.discard(self)
        self._queue.put_nowait(None)

    def give_up(self, error: ApiError) -> None:
        """Tell the client so, instead of the rest of its answers."""
        self._queue.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | End]]:
        """Each answer's pieces in their order, and its end.

        Raises:
            ApiError: the engine failed, or ended them because the server stops.
        """
        while self._open:
            event = await self._queue.get()
            if event is None:
                return
            if isinstance(event, ApiError):
                raise event
            index = self._open.get(event.id)
            if index is None:
                continue
            if isinstance(event, Tokens):
                yield index, self._piece(index, event)
            elif isinstance(event, Finished):
                self._count(event.id, index, event.reason)
                yield index, End(event.reason)
            elif isinstance(event, Failed):
                self._count(event.id, index, "failed")
                raise ApiError(503 if self._service.intake.draining else 500, event.message)

    def _piece(self, index: int, event: Tokens) -> Piece:
        clock = self._clocks[index]
        clock.last = time.monotonic() - self._began
        clock.first = clock.last if clock.first is None else clock.first
        clock.tokens += event.count
        self.usage.cached += event.cached
        self.usage.completion += event.count
        return Piece(event.text, event.scored)

    def _count(self, request: str, index: int, reason: str) -> None:
        del self._open[request]
        clock = self._clocks[index]
        self._service.metrics.generated(
            reason,
            prompt=len(self._requests[index].prompt),
            tokens=clock.tokens,
            first_after=clock.first,
            seconds=None if clock.first is None else clock.last - clock.first,
        )

    @contextlib.asynccontextmanager
    async def watching(self, request: Request) -> AsyncIterator[None]:
        """Cancel all answers when the client goes away before the block has ended, or the block fails."""
        watch = asyncio.create_task(self._until_gone(request))
        try:
            yield
        finally:
            watch.cancel()
            self.close()

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.close()


class Stream(StreamingResponse):
    """Server-sent events; a failure in the middle is the last of them. However it ends, what still runs is cancelled."""

    def __init__(self, asked: Asked, events: AsyncIterator[str]) -> None:
        super().__init__(_or_error(events), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._asked = asked

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it (ASGI 3)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asked.close()


async def _or_error(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events of a stream; where it fails, its status having been sent long ago, the error is an event too."""
    try:
        async for event in events:
            yield event
    except ApiError as error:
        yield replies.event(error.body())


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, TooLong):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": RETRY_AFTER})
    return ApiError(503, "the server is stopping and takes nothing new", headers={"Retry-After": RETRY_AFTER})
