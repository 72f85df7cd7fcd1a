"""Conversations into token ids: the same rendering when a model is trained and when it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import WrongInputError
from launch.rows import Row, Turn

IGNORED = -100  # torch's cross entropy leaves positions with this label out

# For base models, whose tokenizers bring no template.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ message['content'] + eos_token }}"
    "{%- elif message['role'] == 'system' -%}{{ message['content'] + '\n\n' }}"
    "{%- else -%}{{ 'Question: ' + message['content'] + '\nAnswer: ' }}{%- endif -%}"
    "{%- endfor -%}"
)


@dataclass(frozen=True)
class Sample:
    """Token ids and their labels, of one length; a label of `IGNORED` is not learned."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learned(self) -> int:
        """How many tokens are predicted and learned: the first token has no predecessor."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode_row(tokenizer: Any, row: Row) -> Sample:
    """Turn a row of a dataset into a sample: assistant turns are learned, or the whole text of a plain one.

    Raises:
        WrongInputError: the template rewrites earlier turns, so that prompts in training would differ from those when asking.
    """
    if not row.turns:
        plain = tuple(tokenizer(row.text).input_ids)
        if tokenizer.eos_token_id is not None and plain[-1:] != (tokenizer.eos_token_id,):
            plain += (tokenizer.eos_token_id,)
        return Sample(plain, plain)
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for index, turn in enumerate(row.turns):
        if turn.role != "assistant":
            continue
        prompt = _render(tokenizer, row.turns[:index], ask=True)
        answered = _render(tokenizer, row.turns[: index + 1], ask=False)
        if not (prompt.startswith(done) and answered.startswith(prompt)):
            raise WrongInputError(
                "the model's chat template rewrites earlier turns of a conversation, so its labels cannot be told",
                "use rows with a single answer each",
            )
        # Encoded apart, so that no token spans prompt and answer: when the model is asked, the prompt stands alone.
        context, answer = (_ids(tokenizer, text) for text in (prompt[len(done) :], answered[len(prompt) :]))
        ids += context + answer
        labels += [IGNORED] * len(context) + answer
        done = answered
    return Sample(tuple(ids), tuple(labels))


def encode_prompt(tokenizer: Any, turns: Sequence[Turn]) -> list[int]:
    """Token ids of a conversation that waits for the assistant's answer."""
    return _ids(tokenizer, _render(tokenizer, turns, ask=True))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _render(tokenizer: Any, turns: Sequence[Turn], *, ask: bool) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    return str(
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=ask)
    )
