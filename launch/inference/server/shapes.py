"""What clients send: the bodies of OpenAI's API, as far as they can be honoured.

Wrong types are refused, never converted. What cannot be honoured is refused by name; what changes no answer (`user`, `metadata`)
is taken and left aside.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cluster.yamlfile import says

# Bounds that no honest request meets.
MOST_CHOICES = 128
MOST_STOPS = 16
MOST_TOOLS = 128
MOST_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple(value)


def _stops(stops: tuple[str, ...]) -> tuple[str, ...]:
    if len(stops) > MOST_STOPS or not all(stops):
        raise ValueError(f"must be at most {MOST_STOPS} texts, none of them empty")
    return stops


Tokens = Annotated[tuple[TokenId, ...], BeforeValidator(_tuple)]
Stops = Annotated[
    tuple[str, ...], BeforeValidator(_texts), AfterValidator(_stops), says("a text or a list of at most 16 texts")
]


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class StreamOptions(_Lenient):
    """What a stream brings besides the answer."""

    include_usage: bool = False


class Plain(_Lenient):
    """The one response format there is."""

    type: Literal["text"]


def _only_text(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") in ("json_object", "json_schema"):
        raise ValueError(f"{value['type']} is not supported: ask for JSON in the prompt")
    return value


class _Asked(_Shape):
    """What both ways of asking have in common. A missing value takes the model's own default."""

    model: str = Field(min_length=1, max_length=256)
    temperature: float | None = Field(default=None, ge=0, le=10)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stops | None = None
    stop_token_ids: Annotated[Tokens, Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Annotated[Plain | None, BeforeValidator(_only_text)] = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=1024)
    # These change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and self.stream_options.include_usage

    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id.

        Raises:
            ValueError: a key is no token id.
        """
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true only")
        if not all(token.isascii() and token.isdigit() and len(token) < 11 for token in self.logit_bias or {}):
            raise ValueError("logit_bias: its keys must be token ids in quotes")
        return self


class CompletionRequest(_Asked):
    """POST /v1/completions."""

    prompt: Annotated[
        str | list[str] | list[TokenId] | list[list[TokenId]],
        says("a text, a list of texts, token ids, or a list of those"),
    ]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _only_what_can_be(self) -> Self:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of: only its default, n, is supported")
        if len(self.prompts()) * self.choices > MOST_CHOICES:
            raise ValueError(f"prompt: with n it asks for more than {MOST_CHOICES} answers at once")
        if not self.prompts() or not all(len(prompt) for prompt in self.prompts()):
            raise ValueError("prompt: is empty")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class FunctionCall(_Lenient):
    """A call that an assistant made: arguments are JSON in a text."""

    name: str
    arguments: str = "{}"


class ToolCall(_Lenient):
    """A call with the id that its result will name."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


def _text_of(value: Any) -> Any:
    """A message's text, from the list of parts that OpenAI allows it to be."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text"):
            kind = part.get("type") if isinstance(part, dict) else None
            raise ValueError(f"takes parts of type text only, not {kind!s:.40}")
        if not isinstance(part.get("text"), str):
            raise ValueError("a part of type text needs its text")  # noqa: TRY004 - pydantic takes only this one
        texts.append(part["text"])
    return "\n".join(texts)


class Message(_Lenient):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text_of)] = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_calls: Annotated[tuple[ToolCall, ...], BeforeValidator(_tuple)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of role {self.role} needs its content")
        return self


class Function(_Lenient):
    """What a model may call; `parameters` is a JSON Schema."""

    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Lenient):
    """One function offered to the model."""

    type: Literal["function"]
    function: Function


def _free_choice(value: Any) -> Any:
    if value == "required" or isinstance(value, dict):
        raise ValueError("only auto and none are supported: a call cannot be forced")
    return value


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    tools: Annotated[tuple[Tool, ...], BeforeValidator(_tuple), Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Annotated[Literal["auto", "none"] | None, BeforeValidator(_free_choice)] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(default=None, max_length=32)
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _asks_once(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true only")
        if self.tool_choice is not None and not self.tools:
            raise ValueError("tool_choice goes with tools only")
        return self

    @property
    def longest(self) -> int | None:
        """How many tokens an answer may have; None: as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens
