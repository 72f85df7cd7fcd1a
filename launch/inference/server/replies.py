"""What clients get: OpenAI's bodies, whole or in pieces. Pure."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.inference.intake import Scored
from launch.inference.server.speech import Call, Said
from launch.inference.server.vocabulary import Vocabulary

DONE = "data: [DONE]\n\n"


@dataclass
class Usage:
    """Tokens that a request took."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def body(self) -> dict[str, Any]:
        """As OpenAI has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True)
class Head:
    """What every piece of one reply begins with."""

    kind: str
    model: str
    prefix: str
    id: str = field(default="")
    created: int = 0

    @classmethod
    def of(cls, kind: str, model: str) -> Head:
        """A new reply of kind `chat.completion` or `text_completion`."""
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        return cls(kind, model, prefix, f"{prefix}-{secrets.token_hex(12)}", int(time.time()))

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The reply in one piece."""
        return {**self._fields(self.kind), "choices": list(choices), "usage": usage.body()}

    def piece(self, choices: Sequence[dict[str, Any]], usage: Usage | None = None) -> str:
        """One event of a stream; the last one, without choices, holds the usage where it was asked for."""
        kind = f"{self.kind}.chunk" if self.kind == "chat.completion" else self.kind
        body = {**self._fields(kind), "choices": list(choices)}
        return event(body | ({"usage": usage.body()} if usage is not None else {}))

    def _fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(body: dict[str, Any]) -> str:
    """A server-sent event. JSON escapes line ends, so it is one line."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def call(made: Call, index: int | None = None) -> dict[str, Any]:
    """A tool's call; in a stream it has an index."""
    place = {} if index is None else {"index": index}
    return {
        **place,
        "id": made.id,
        "type": "function",
        "function": {"name": made.name, "arguments": made.arguments},
    }


def message(said: Iterable[Said]) -> dict[str, Any]:
    """The assistant's message, made of all that was said."""
    pieces = list(said)
    answer, thought = "".join(piece.answer for piece in pieces), "".join(piece.thought for piece in pieces)
    calls = [call(piece.call) for piece in pieces if piece.call is not None]
    made: dict[str, Any] = {"role": "assistant", "content": answer if answer or not calls else None}
    if thought:
        made["reasoning_content"] = thought
    if calls:
        made["tool_calls"] = calls
    return made


def delta(piece: Said, calls: int) -> dict[str, Any]:
    """The same in a stream; `calls` have been made before."""
    if piece.call is not None:
        return {"tool_calls": [call(piece.call, calls)]}
    return {"reasoning_content": piece.thought} if piece.thought else {"content": piece.answer}


def chat_logprobs(scored: Iterable[Scored], vocabulary: Vocabulary) -> dict[str, Any]:
    """Log probabilities as chat has them."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = vocabulary.bytes_of(token)
        return {"token": vocabulary.text_of(token), "logprob": _finite(logprob or 0.0), "bytes": list(raw)}

    return {
        "content": [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.top]}
            for one in scored
        ],
        "refusal": None,
    }


def plain_logprobs(scored: Iterable[Scored], vocabulary: Vocabulary, *, offset: int, top: int) -> dict[str, Any]:
    """Log probabilities as completions have them; `offset` is the first token's place in the text."""
    tokens, values, tops, offsets = [], [], [], []
    for one in scored:
        tokens.append(vocabulary.text_of(one.token))
        values.append(None if one.logprob is None else _finite(one.logprob))
        best: dict[str, float] = {}
        for token, value in one.top[:top]:
            best.setdefault(vocabulary.text_of(token), _finite(value))
        tops.append(None if one.logprob is None else best)
        offsets.append(offset)
        offset += len(vocabulary.bytes_of(one.token).decode(errors="ignore"))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _finite(value: float) -> float:
    """JSON has no infinity; this is OpenAI's word for never."""
    return max(value, -9999.0)
