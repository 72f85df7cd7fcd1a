"""Conversations into token ids: the same rendering when a model is trained and when it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from cluster.errors import WrongInputError
from launch.rows import Row, Turn

IGNORED = -100  # torch's cross entropy leaves positions with this label out

# For base models, whose tokenizers bring no template. The space before an answer belongs to the answer: byte-pair vocabularies
# hold words with the space before them, and a prompt that ended in one would leave the model with a word it has rarely seen.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ ' ' + message['content'] + eos_token }}"
    "{%- elif message['role'] == 'system' -%}{{ message['content'] + '\n\n' }}"
    "{%- else -%}{{ 'Question: ' + message['content'] + '\nAnswer:' }}{%- endif -%}"
    "{%- endfor -%}"
)


@dataclass(frozen=True)
class Sample:
    """Token ids and their labels, of one length; a label of `IGNORED` is not learned. Without `positions` they count from 0."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    positions: tuple[int, ...] = ()

    @property
    def learned(self) -> int:
        """How many tokens are predicted and learned: the first token has no predecessor."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode_row(tokenizer: Any, row: Row) -> Sample:
    """Turn a row of a dataset into a sample: assistant turns are learned, or the whole text of a plain one.

    Raises:
        WrongInputError: the template refuses the conversation, or rewrites earlier turns, so that prompts in training would
            differ from those when asking.
    """
    if not row.turns:
        plain = tuple(tokenizer(row.text).input_ids)
        if tokenizer.eos_token_id is not None and plain[-1:] != (tokenizer.eos_token_id,):
            plain += (tokenizer.eos_token_id,)
        return Sample(plain, plain)
    ids: list[int] = []
    labels: list[int] = []
    try:
        exchanges, _ = _exchanges(tokenizer, row.turns)
    except WrongInputError as wrong:
        raise WrongInputError(f"{row.where}: {wrong.message}" if row.where else wrong.message, wrong.fix) from None
    for exchange in exchanges:
        context, answer = _ids(tokenizer, exchange.context), _ids(tokenizer, exchange.answer)
        ids += context + answer
        labels += [IGNORED] * len(context) + answer
    return Sample(tuple(ids), tuple(labels))


def encode_prompt(tokenizer: Any, turns: Sequence[Turn]) -> list[int]:
    """Token ids of a conversation that waits for the assistant's answer, cut into pieces as in training.

    Raises:
        WrongInputError: the template refuses the conversation.
    """
    prompt = _render(tokenizer, turns, ask=True)
    try:
        exchanges, done = _exchanges(tokenizer, turns)
    except WrongInputError:  # then no row like this was trained on either
        return _ids(tokenizer, prompt)
    if not prompt.startswith(done):
        return _ids(tokenizer, prompt)
    ids = [id for one in exchanges for text in (one.context, one.answer) for id in _ids(tokenizer, text)]
    return ids + _ids(tokenizer, prompt[len(done) :])


def render_messages(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation that may hold tools, their calls and results, ready for the assistant's answer.

    Args:
        messages: as chat templates take them: role, content, and where there are any tool_calls whose arguments are a mapping.
        tools: as OpenAI's API has them.
        settings: what else the template is told, such as enable_thinking.

    Raises:
        WrongInputError: the template refuses the conversation, or knows no tools.
    """
    if tools and "tools" not in (tokenizer.chat_template or ""):
        raise WrongInputError("the model's chat template knows no tools", "ask without tools, or serve another model")
    return _apply(tokenizer, messages, ask=True, tools=list(tools) or None, **(settings or {}))


def encode_messages(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of such a conversation; a plain one is cut into pieces as in training.

    Raises:
        WrongInputError: see `render_messages`.
    """
    if not tools and not settings and all(message.keys() == {"role", "content"} for message in messages):
        return encode_prompt(tokenizer, [Turn(message["role"], message["content"]) for message in messages])
    return _ids(tokenizer, render_messages(tokenizer, messages, tools=tools, settings=settings))


@dataclass(frozen=True)
class _Exchange:
    """An answer as it is rendered, and what is rendered between it and the answer before.

    They are encoded apart, so that no token spans prompt and answer: when the model is asked, the prompt stands alone.
    """

    context: str
    answer: str


def _exchanges(tokenizer: Any, turns: Sequence[Turn]) -> tuple[list[_Exchange], str]:
    """Every answer of a conversation, and all the text up to the last one's end."""
    found: list[_Exchange] = []
    done = ""
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt = _render(tokenizer, turns[:index], ask=True)
        answered = _render(tokenizer, turns[: index + 1], ask=False)
        if not prompt.startswith(done):
            raise WrongInputError(
                "the model's chat template rewrites earlier turns of a conversation, so its labels cannot be told",
                "use rows with a single answer each",
            )
        found.append(_Exchange(prompt[len(done) :], _answer(answered, prompt, turn)))
        done = answered
    return found, done


def _answer(answered: str, prompt: str, turn: Turn) -> str:
    """What the model is to write after `prompt`.

    Templates of reasoning models open the reasoning when they ask (`<think>`) and leave it out of the answers they show. Then
    the answer is what was said and what ends it, put where the prompt leads.
    """
    if answered.startswith(prompt):
        return answered[len(prompt) :]
    start = answered.rfind(turn.content.strip())
    if start < 0:
        raise WrongInputError(
            "the model's chat template rewrites the answer itself, so its labels cannot be told",
            "look at the chat template in the model's folder",
        )
    return answered[start:]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _render(tokenizer: Any, turns: Sequence[Turn], *, ask: bool) -> str:
    return _apply(tokenizer, [{"role": turn.role, "content": turn.content} for turn in turns], ask=ask)


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, ask: bool, **settings: Any) -> str:
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    if template is not None and tokenizer.eos_token is None:
        raise WrongInputError(
            "the model's tokenizer has neither a chat template nor an end-of-text token, so no answer would end",
            "name an eos_token in tokenizer_config.json of the model's folder",
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=ask, **settings
            )
        )
    except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WrongInputError(
            f"the model's chat template refuses the conversation: {reason}", "use only the roles that it knows"
        ) from None
