"""POST /v1/completions: texts or token ids are gone on with, as they are; evaluation programs ask for the prompt's own scores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from launch.inference.intake import Scored
from launch.inference.server import replies
from launch.inference.server.asking import Asked, End, Piece, Stream, prepare
from launch.inference.server.errors import bad
from launch.inference.server.service import Service
from launch.inference.server.shapes import CompletionRequest

# OpenAI's.
DEFAULT_LENGTH = 16


class Completions:
    """One request; each of its prompts has `n` answers."""

    def __init__(self, service: Service, wanted: CompletionRequest) -> None:
        self._service = service
        self._wanted = wanted
        self._head = replies.Head.of("text_completion", wanted.model)

    async def respond(self, request: Request) -> Response:
        """The whole answers, or a stream of their pieces.

        Raises:
            ApiError: the request cannot be taken, or failed.
        """
        wanted = self._wanted
        adapter = self._service.adapter_of(wanted.model)
        prompts = await asyncio.to_thread(lambda: [self._encode(prompt) for prompt in wanted.prompts()])
        makers = [
            prepare(
                self._service,
                wanted,
                prompt,
                adapter=adapter,
                longest=wanted.max_tokens or DEFAULT_LENGTH,
                logprobs=wanted.logprobs,
                echo=bool(wanted.echo),
            )
            for prompt in prompts
        ]
        asked = Asked(
            self._service, [make(index) for make in makers for index in range(wanted.choices)], choices=wanted.choices
        )
        texts = [self._service.decode(prompt) for prompt in prompts for _ in range(wanted.choices)]
        if wanted.stream:
            return Stream(asked, self._events(asked, texts))
        async with asked.watching(request):
            return JSONResponse(await self._whole(asked, texts))

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = list(self._service.tokenizer(prompt).input_ids)
        else:
            ids, size = prompt, self._service.vocabulary_size
            if wrong := next((token for token in ids if token >= size), None):
                raise bad("prompt", f"token id {wrong} is outside the model's vocabulary of {size}")
        if not ids:
            raise bad("prompt", "is empty")
        return ids

    async def _whole(self, asked: Asked, prompts: list[str]) -> dict[str, Any]:
        count = len(prompts)
        texts = [prompt if self._wanted.echo else "" for prompt in prompts]
        scored: list[list[Scored]] = [[] for _ in range(count)]
        reasons = [""] * count
        async for index, event in asked:
            if isinstance(event, Piece):
                texts[index] += event.text
                scored[index] += event.scored
            else:
                reasons[index] = event.reason
        choices = [
            _choice(index, texts[index], self._logprobs(scored[index], 0), reasons[index]) for index in range(count)
        ]
        return self._head.whole(choices, asked.usage)

    async def _events(self, asked: Asked, prompts: list[str]) -> AsyncIterator[str]:
        echo = [self._wanted.echo or False] * len(prompts)
        offsets = [0] * len(prompts)
        async for index, event in asked:
            if isinstance(event, End):
                yield self._head.piece([_choice(index, "", None, event.reason)])
                continue
            text = event.text
            if echo[index]:
                text, echo[index] = prompts[index] + text, False
            # A token that completes no character is an event too: clients time tokens by them.
            yield self._head.piece([_choice(index, text, self._logprobs(event.scored, offsets[index]), None)])
            offsets[index] += len(text)
        if self._wanted.wants_usage:
            yield self._head.piece([], asked.usage)
        yield replies.DONE

    def _logprobs(self, scored: Any, offset: int) -> dict[str, Any] | None:
        top = self._wanted.logprobs
        if top is None:
            return None
        return replies.plain_logprobs(scored, self._service.vocabulary, offset=offset, top=top)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
