"""Thoughts, answers and calls are told apart, however the text is cut into pieces; and nothing that was said is lost."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from launch.inference.server.speech import Said, form_of, listener

# The marks by which a chat template is recognised.
HERMES = "{%- if tools %}<tool_call>\n{...}\n</tool_call>{% endif %}"
THINKING = HERMES + "<think></think>"
GLM = "<think></think> <tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>..."
CODER = "<tool_call>\n<function=example>\n<parameter=x>"
LLAMA = 'Respond in the format {"name": function name, "parameters": dictionary}: tools "parameters"'
MISTRAL = "[AVAILABLE_TOOLS][TOOL_CALLS]"
GPT_OSS = "<|start|>assistant<|channel|>analysis<|message|>"

CASES: dict[str, tuple[str, str, str, str, list[tuple[str, dict[str, object]]]]] = {
    # name: (template, text, answer, thought, calls)
    "plain text": (HERMES, "It is 4 < 5, you know.", "It is 4 < 5, you know.", "", []),
    "hermes": (
        HERMES,
        'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>',
        "Let me look.\n",
        "",
        [("weather", {"city": "Köln"})],
    ),
    "two calls": (
        HERMES,
        '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "b", "arguments": {"x": [1]}}\n</tool_call>',
        "",
        "",
        [("a", {}), ("b", {"x": [1]})],
    ),
    "a call that is none stays text": (
        HERMES,
        "<tool_call>\nnot JSON\n</tool_call> so",
        "<tool_call>\nnot JSON\n</tool_call> so",
        "",
        [],
    ),
    "a call without its end": (
        HERMES,
        '<tool_call>{"name": "a", "arguments": {"x": 1',
        '<tool_call>{"name": "a", "arguments": {"x": 1',
        "",
        [],
    ),
    "a call whose end mark is missing": (HERMES, '<tool_call>{"name": "a", "arguments": {}}', "", "", [("a", {})]),
    "a mark that is not finished": (HERMES, "less <tool", "less <tool", "", []),
    "thinking": (THINKING, "<think>\nHm.\n</think>\n\nFour.", "Four.", "\nHm.\n", []),
    "thinking then calling": (
        THINKING,
        '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>',
        "",
        "\nHm.\n",
        [("a", {})],
    ),
    "glm": (
        GLM,
        "<think>Hm.</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>",
        "",
        "Hm.",
        [("weather", {"city": "Rome", "days": 3})],
    ),
    "qwen coder": (
        CODER,
        "<tool_call>\n<function=run>\n<parameter=code>\nprint(1)\n</parameter>\n</function>\n</tool_call>",
        "",
        "",
        [("run", {"code": "print(1)"})],
    ),
    "llama": (LLAMA, '{"name": "weather", "parameters": {"city": "Rome"}}', "", "", [("weather", {"city": "Rome"})]),
    "llama, python tag, two": (
        LLAMA,
        '<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b", "parameters": {"x": 1}}',
        "",
        "",
        [("a", {}), ("b", {"x": 1})],
    ),
    "llama, JSON that is no call": (LLAMA, '{"city": "Rome"}', '{"city": "Rome"}', "", []),
    "llama, text": (LLAMA, "Hello {you}", "Hello {you}", "", []),
    "mistral": (MISTRAL, '[TOOL_CALLS][{"name": "a", "arguments": {"x": 1}}]', "", "", [("a", {"x": 1})]),
    "gpt-oss": (
        GPT_OSS,
        "<|channel|>analysis<|message|>Simple.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
        "Four.",
        "Simple.",
        [],
    ),
    "gpt-oss calls": (
        GPT_OSS,
        "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Rome"}<|call|>',
        "",
        "Look.",
        [("weather", {"city": "Rome"})],
    ),
    "gpt-oss without a header": (GPT_OSS, "Four.", "Four.", "", []),
}


def hear(template: str, pieces: list[str], *, tools: bool = True, thinking: bool = False) -> list[Said]:
    """All that is said in these pieces of text."""
    one = listener(template, tools=tools, thinking=thinking)
    return [said for piece in pieces for said in one.take(piece)] + one.end()


def summed(said: list[Said]) -> tuple[str, str, list[tuple[str, dict[str, object]]]]:
    """The answer, the thought, and the calls with their arguments read."""
    calls = [(piece.call.name, json.loads(piece.call.arguments)) for piece in said if piece.call is not None]
    return "".join(piece.answer for piece in said), "".join(piece.thought for piece in said), calls


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_is_told_apart_however_it_is_cut(name: str) -> None:
    template, text, *expected = CASES[name]
    assert summed(hear(template, [text])) == tuple(expected)
    assert summed(hear(template, list(text))) == tuple(expected)
    chance = random.Random(name)  # noqa: S311 - reproducible
    for _ in range(20):
        cuts = sorted({0, len(text), *chance.choices(range(len(text)), k=3)})
        pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
        assert summed(hear(template, pieces)) == tuple(expected), pieces


def test_a_prompt_that_opens_the_thought_leads_into_it() -> None:
    said = hear(THINKING, ["Hm", ".\n</th", "ink>\n\nFour."], thinking=True)
    assert summed(said) == ("Four.", "Hm.\n", [])


def test_the_space_before_a_plain_answer_is_none_of_it() -> None:
    one = listener("", tools=False, thinking=False, spaced=True)
    assert one.take("") == []
    assert one.take(" Four") + one.take(" five") + one.end() == [Said(answer="Four"), Said(answer=" five")]


def test_text_comes_as_soon_as_it_cannot_be_a_mark() -> None:
    one = listener(HERMES, tools=True, thinking=False)
    assert one.take("Hello <") == [Said(answer="Hello ")]
    assert one.take("b> you") == [Said(answer="<b> you")]


def test_calls_are_looked_for_only_where_tools_were_offered() -> None:
    text = '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>'
    assert summed(hear(HERMES, list(text), tools=False)) == (text, "", [])
    assert form_of("", tools=True).blocks == ()


def test_each_call_has_an_id_of_its_own() -> None:
    said = hear(HERMES, ['<tool_call>{"name": "a", "arguments": {}}</tool_call>' * 2])
    ids = [piece.call.id for piece in said if piece.call is not None]
    assert len(set(ids)) == 2
    assert all(one.startswith("call_") for one in ids)
