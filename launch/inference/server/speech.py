"""What a model says, told apart while it comes: thoughts, the answer, and calls of tools.

Each family writes its calls in a form of its own, which its chat template shows. A call is passed on when it is complete and can
be read; anything that looked like one and was none stays text, so that nothing a model says is lost.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` is JSON, as OpenAI's clients expect it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Said:
    """A piece of what was said."""

    answer: str = ""
    thought: str = ""
    call: Call | None = None


@dataclass(frozen=True)
class Block:
    """Text between two marks that is no answer: a thought (no `read`), or calls."""

    start: str
    end: str
    read: Callable[[str], list[Call]] | None = None


@dataclass(frozen=True)
class Form:
    """How a model marks its thoughts and calls. `whole` reads an answer that is nothing but a call.

    With `channels` the model speaks in messages, each with a header (gpt-oss); its marks are special tokens, which must be kept.
    """

    blocks: tuple[Block, ...] = ()
    whole: Callable[[str], list[Call]] | None = None
    channels: bool = False


def form_of(template: str, *, tools: bool) -> Form:
    """The form that a chat template implies; calls are looked for only where tools were offered."""
    if "<|channel|>" in template:
        return Form(channels=True)
    blocks = [Block("<think>", "</think>")] if "</think>" in template else []
    if not tools:
        return Form(tuple(blocks))
    if "<tool_call>" in template:
        read = _glm if "<arg_key>" in template else _qwen_coder if "<function=" in template else _hermes
        blocks.append(Block("<tool_call>", "</tool_call>", read))
    elif "[TOOL_CALLS]" in template:
        return Form(tuple(blocks), whole=_mistral)
    elif '"parameters"' in template or "<|python_tag|>" in template:
        return Form(tuple(blocks), whole=_llama)
    return Form(tuple(blocks))


class Listener:
    """Takes the text of one answer piece by piece.

    Args:
        thinking: the prompt itself has opened a thought.
        spaced: an answer begins with a space that is none of it, as in the template of models that bring none.
    """

    def __init__(self, form: Form, *, thinking: bool = False, spaced: bool = False) -> None:
        self._form = form
        self._spaced = spaced
        self._block = form.blocks[0] if thinking and form.blocks else None
        self._held = ""
        self._fresh = True  # nothing of the answer has been passed on yet

    def take(self, text: str) -> list[Said]:
        """What `text` completes. What may be the beginning of a mark, or of a call, is held back."""
        if self._spaced and text:
            self._spaced, text = False, text.removeprefix(" ")
        self._held += text
        if self._form.whole is not None and self._fresh and self._may_be_whole():
            return []
        return list(self._pass_on(last=False))

    def end(self) -> list[Said]:
        """What was held back: nothing more comes."""
        if self._form.whole is not None and self._fresh and (calls := self._form.whole(self._held)):
            self._held = ""
            return [Said(call=call) for call in calls]
        return list(self._pass_on(last=True))

    def _may_be_whole(self) -> bool:
        begun = self._held.lstrip()
        marks = ("{", "[", "<|python_tag|>", "[TOOL_CALLS]")
        return not begun or any(begun.startswith(mark) or mark.startswith(begun) for mark in marks)

    def _pass_on(self, *, last: bool) -> list[Said]:
        said: list[Said] = []
        while self._held:
            if self._block is None:
                if not self._before_a_block(said, last=last):
                    break
            elif not self._inside_a_block(said, last=last):
                break
        return [piece for piece in said if piece != Said()]

    def _before_a_block(self, said: list[Said], *, last: bool) -> bool:
        """Pass on answer up to the next mark; whether there was one."""
        found = [(self._held.find(block.start), block) for block in self._form.blocks if block.start in self._held]
        at, block = min(found, key=lambda each: each[0], default=(len(self._held), None))
        keep = 0 if block is not None or last else _beginning_of([b.start for b in self._form.blocks], self._held)
        self._answer(said, self._held[: at - keep])
        self._held = self._held[at - keep :]
        if block is None:
            return False
        self._held, self._block = self._held[len(block.start) :], block
        return True

    def _inside_a_block(self, said: list[Said], *, last: bool) -> bool:
        """Pass on a thought as it comes, calls when they are complete; whether the block has ended."""
        block = self._block
        assert block is not None
        inside, mark, rest = self._held.partition(block.end)
        if block.read is None:
            keep = 0 if mark or last else _beginning_of([block.end], inside)
            said.append(Said(thought=inside[: len(inside) - keep]))
            self._held = rest if mark else inside[len(inside) - keep :]
        elif mark or last:
            calls = block.read(inside)
            said += [Said(call=call) for call in calls]
            self._fresh = self._fresh or bool(calls)  # blank lines after a call are no answer either
            if not calls:
                self._answer(said, block.start + inside + mark)
            self._held = rest
        if not mark:
            return False
        self._block = None
        return True

    def _answer(self, said: list[Said], text: str) -> None:
        if self._fresh:
            text = text.lstrip("\n") if self._form.blocks else text
        if text.strip() or (text and not self._fresh):
            self._fresh = False
        elif self._form.blocks:  # blank lines between a thought, calls and the answer are no answer
            text = ""
        said.append(Said(answer=text))


def _beginning_of(marks: Sequence[str], text: str) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    return next(
        (
            size
            for size in range(min(longest, len(text)), 0, -1)
            if any(mark.startswith(text[-size:]) for mark in marks)
        ),
        0,
    )


# ---- gpt-oss: every message has a header, which names its channel and, for a call, whom it is to.

_HEADER = re.compile(r"<\|channel\|>\s*(?P<channel>\w+)")
_RECIPIENT = re.compile(r"to=functions\.(?P<name>[\w.-]+)")
_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")


class ChannelListener:
    """A Listener for gpt-oss's channels: analysis is a thought, commentary to a function a call, all else the answer."""

    def __init__(self) -> None:
        self._held = ""
        self._channel: Literal["", "answer", "thought", "call"] = ""
        self._name = ""

    def take(self, text: str) -> list[Said]:
        """What `text` completes."""
        self._held += text
        return self._pass_on(last=False)

    def end(self) -> list[Said]:
        """What was held back: nothing more comes."""
        said = self._pass_on(last=True)
        if not self._channel and self._held.strip() and "<|" not in self._held:
            said.append(Said(answer=self._held))  # it spoke without any header
        return said

    def _pass_on(self, *, last: bool) -> list[Said]:
        said: list[Said] = []
        while self._held:
            if not self._channel:
                header, mark, rest = self._held.partition(_MESSAGE)
                if not mark:
                    break
                self._open(header)
                self._held = rest
                continue
            ends = [(self._held.find(end), end) for end in _ENDS if end in self._held]
            at, end = min(ends, default=(len(self._held), ""))
            if self._channel == "call":
                if not end and not last:
                    break
                said += _call_or_text(self._name, self._held[:at])
            else:
                at -= 0 if end or last else _beginning_of(_ENDS, self._held)
                text = self._held[:at]
                if text:
                    said.append(Said(thought=text) if self._channel == "thought" else Said(answer=text))
            self._held = self._held[at + len(end) :]
            if not end:
                break
            self._channel = ""
        return said

    def _open(self, header: str) -> None:
        recipient, channel = _RECIPIENT.search(header), _HEADER.search(header)
        self._name = recipient["name"] if recipient else ""
        if recipient:
            self._channel = "call"
        else:
            self._channel = "thought" if channel is not None and channel["channel"] == "analysis" else "answer"


def listener(template: str, *, tools: bool, thinking: bool, spaced: bool = False) -> Listener | ChannelListener:
    """Who listens to the answers of a model with this chat template."""
    form = form_of(template, tools=tools)
    return ChannelListener() if form.channels else Listener(form, thinking=thinking, spaced=spaced)


# ---- The forms of calls


def _call(name: Any, arguments: Any) -> Call | None:
    if not isinstance(name, str) or not name:
        return None
    if isinstance(arguments, str):  # some models quote what is JSON already
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if not isinstance(arguments, dict):
        return None
    return Call(f"call_{secrets.token_hex(12)}", name, json.dumps(arguments, ensure_ascii=False))


def _call_or_text(name: str, text: str) -> list[Said]:
    call = _call(name, text)
    return [Said(call=call)] if call is not None else [Said(answer=text)]


def _objects(text: str) -> list[Any] | None:
    """The JSON values of a text, one after another with blanks, commas or semicolons between; None where anything else is there."""
    values: list[Any] = []
    at, decoder = 0, json.JSONDecoder()
    while True:
        while at < len(text) and text[at] in " \t\r\n;,":
            at += 1
        if at == len(text):
            return values
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        values += value if isinstance(value, list) else [value]


def _calls_of(values: list[Any] | None) -> list[Call]:
    calls = []
    for value in values or []:
        if not isinstance(value, dict):
            return []
        call = _call(value.get("name"), value.get("arguments", value.get("parameters")))
        if call is None:
            return []
        calls.append(call)
    return calls


def _hermes(text: str) -> list[Call]:
    """`{"name": ..., "arguments": {...}}` (Hermes, Qwen2.5, Qwen3)."""
    return _calls_of(_objects(text))


def _llama(text: str) -> list[Call]:
    """The same with `parameters`, as the whole answer (Llama 3.1 and later)."""
    return _calls_of(_objects(text.strip().removeprefix("<|python_tag|>")))


def _mistral(text: str) -> list[Call]:
    """A list of the same after a mark (Mistral)."""
    return _calls_of(_objects(text.strip().removeprefix("[TOOL_CALLS]")))


def _glm(text: str) -> list[Call]:
    """A name, then keys and values in tags (GLM-4.5); a value that is no JSON is a text."""
    name, _, rest = text.partition("<arg_key>")
    pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", "<arg_key>" + rest, re.DOTALL)
    call = _call(name.strip(), {key.strip(): _value(value) for key, value in pairs})
    return [call] if call is not None and not re.search(r"\s", name.strip()) else []


def _qwen_coder(text: str) -> list[Call]:
    """`<function=NAME><parameter=KEY>VALUE</parameter></function>` (Qwen3-Coder)."""
    calls = []
    for name, inside in re.findall(r"<function=([^>\s]+)>(.*?)</function>", text, re.DOTALL):
        pairs = re.findall(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", inside, re.DOTALL)
        call = _call(name, {key: _value(value) for key, value in pairs})
        if call is not None:
            calls.append(call)
    return calls


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
