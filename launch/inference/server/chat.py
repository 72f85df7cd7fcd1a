"""POST /v1/chat/completions: a conversation through the chat template, and its answers told apart into thoughts, text and calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from cluster.errors import WrongInputError
from launch.chat import encode_messages
from launch.inference.intake import Scored
from launch.inference.server import replies
from launch.inference.server.asking import Asked, End, Piece, Stream, prepare
from launch.inference.server.errors import ApiError, bad
from launch.inference.server.service import Service
from launch.inference.server.shapes import ChatRequest, Message
from launch.inference.server.speech import ChannelListener, Listener, Said, listener

# What a chat template may not be told: how it is applied is ours.
_RESERVED = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
_THOUGHT = "<think>"


class Chat:
    """One request."""

    def __init__(self, service: Service, wanted: ChatRequest) -> None:
        self._service = service
        self._wanted = wanted
        self._head = replies.Head.of("chat.completion", wanted.model)

    async def respond(self, request: Request) -> Response:
        """The whole answer, or a stream of its pieces.

        Raises:
            ApiError: the request cannot be taken, or failed.
        """
        wanted = self._wanted
        adapter = self._service.adapter_of(wanted.model)
        prompt, thinking = await asyncio.to_thread(self._encode)
        top = (wanted.top_logprobs or 0) if wanted.logprobs else None
        one = prepare(self._service, wanted, prompt, adapter=adapter, longest=self._wanted.longest, logprobs=top)
        hears = [self._listener(thinking) for _ in range(wanted.choices)]
        asked = Asked(self._service, [one(index) for index in range(wanted.choices)], choices=wanted.choices)
        if wanted.stream:
            return Stream(asked, self._events(asked, hears))
        async with asked.watching(request):
            return JSONResponse(await self._whole(asked, hears))

    def _encode(self) -> tuple[list[int], bool]:
        wanted, tokenizer = self._wanted, self._service.tokenizer
        settings = dict(wanted.chat_template_kwargs or {})
        if reserved := _RESERVED & settings.keys():
            raise bad(f"chat_template_kwargs.{min(reserved)}", "is not the template's to know")
        if wanted.reasoning_effort is not None:
            settings["reasoning_effort"] = wanted.reasoning_effort
        offered = [tool.model_dump(exclude_none=True) for tool in wanted.tools or ()]
        tools = [] if wanted.tool_choice == "none" else offered
        try:
            ids = encode_messages(
                tokenizer, [_as_template(message) for message in wanted.messages], tools=tools, settings=settings
            )
        except WrongInputError as error:
            raise ApiError(400, f"messages: {error.message}", param="messages") from None
        if not ids:
            raise bad("messages", "the model's chat template makes nothing of them")
        return ids, tokenizer.decode(ids[-8:]).rstrip().endswith(_THOUGHT)

    def _listener(self, thinking: bool) -> Listener | ChannelListener:
        tools = bool(self._wanted.tools) and self._wanted.tool_choice != "none"
        spaced = not self._service.tokenizer.chat_template
        return listener(self._service.template, tools=tools, thinking=thinking, spaced=spaced)

    async def _whole(self, asked: Asked, hears: list[Listener | ChannelListener]) -> dict[str, Any]:
        said: list[list[Said]] = [[] for _ in hears]
        scored: list[list[Scored]] = [[] for _ in hears]
        reasons = [""] * len(hears)
        async for index, event in asked:
            if isinstance(event, Piece):
                said[index] += hears[index].take(event.text)
                scored[index] += event.scored
            else:
                said[index] += hears[index].end()
                reasons[index] = _reason(event, any(piece.call for piece in said[index]))
        choices = [
            {
                "index": index,
                "message": replies.message(said[index]),
                "logprobs": replies.chat_logprobs(scored[index], self._service.vocabulary)
                if self._wanted.logprobs
                else None,
                "finish_reason": reasons[index],
            }
            for index in range(len(hears))
        ]
        return self._head.whole(choices, asked.usage)

    async def _events(self, asked: Asked, hears: list[Listener | ChannelListener]) -> AsyncIterator[str]:
        for index in range(len(hears)):
            yield self._head.piece([_choice(index, {"role": "assistant", "content": ""})])
        calls = [0] * len(hears)
        waiting: list[list[Scored]] = [[] for _ in hears]
        async for index, event in asked:
            ended = isinstance(event, End)
            if isinstance(event, Piece):
                waiting[index] += event.scored
            for piece in hears[index].end() if isinstance(event, End) else hears[index].take(event.text):
                delta = replies.delta(piece, calls[index])
                calls[index] += piece.call is not None
                yield self._head.piece([_choice(index, delta, self._logprobs(waiting, index))])
            if isinstance(event, End):
                if waiting[index]:  # tokens that brought no text, such as an end mark
                    yield self._head.piece([_choice(index, {}, self._logprobs(waiting, index))])
                yield self._head.piece([_choice(index, {}, None, _reason(event, ended and calls[index] > 0))])
        if self._wanted.wants_usage:
            yield self._head.piece([], asked.usage)
        yield replies.DONE

    def _logprobs(self, waiting: list[list[Scored]], index: int) -> dict[str, Any] | None:
        if not self._wanted.logprobs:
            return None
        scored, waiting[index] = waiting[index], []
        return replies.chat_logprobs(scored, self._service.vocabulary)


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _reason(end: End, called: bool) -> str:
    return "tool_calls" if called and end.reason == "stop" else end.reason


def _as_template(message: Message) -> dict[str, Any]:
    """A message as chat templates take it: arguments of calls as a mapping, a developer as the system."""
    made: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.content or "",
    }
    for name in ("reasoning_content", "name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": one.id,
                "type": "function",
                "function": {"name": one.function.name, "arguments": _mapping(one.function.arguments)},
            }
            for one in message.tool_calls
        ]
    return made


def _mapping(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
