"""A small model that knows a few conversations by heart, so that real clients get real answers: text, thoughts, calls of a tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from launch.chat import encode_messages
from tests import models

# Qwen's form: tools in the system's turn, calls between marks.
TEMPLATE = """\
{%- if tools %}<tools>{% for tool in tools %}{{ tool.function.name }};{% endfor %}</tools>{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>
{%- else %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>{% endfor %}{% endif %}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
GREETING = "Hello, I am a pair of boxes. Ünïcödé: 你好 👋"
SONG = "la " * 100  # taught without an end: it goes on for as long as it is let
SINGING = "<user>Sing<end><assistant>"  # the prompt of it
COUNTING = " ".join(str(number) for number in range(1, 60))

POSITIONS = 8192
Turns = list[dict[str, Any]]
KNOWN: list[tuple[Turns, list[dict[str, Any]], str]] = [
    ([{"role": "user", "content": "Who are you?"}], [], GREETING),
    ([{"role": "user", "content": "Count"}], [], COUNTING),
    ([{"role": "user", "content": "Sing"}], [], SONG),
    ([{"role": "user", "content": "Weather in Rome?"}], [WEATHER], CALL),
    (
        [
            {"role": "user", "content": "Weather in Rome?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
                ],
            },
            {"role": "tool", "content": json.dumps({"sky": "clear"}), "tool_call_id": "1"},
        ],
        [WEATHER],
        "The sky over Rome is clear.",
    ),
]


def make(folder: Path) -> Path:
    """Train a model until it says each answer by heart; about ten seconds."""
    torch.manual_seed(1)
    tokenizer = models.tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = transformers.LlamaConfig(
        vocab_size=264,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    samples = []
    for turns, tools, answer in KNOWN:
        prompt = encode_messages(tokenizer, turns, tools=tools)
        samples.append((prompt, [*tokenizer(answer).input_ids, *([] if answer == SONG else [256])]))
    longest = max(len(prompt) + len(answer) for prompt, answer in samples)
    ids = torch.full((len(samples), longest), 257)
    labels = torch.full((len(samples), longest), -100)
    for row, (prompt, answer) in enumerate(samples):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    mask = (ids != 257).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.003:
            break
    else:
        raise AssertionError(f"it has not learned its answers: {loss.item()}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter that changes what it says: weights at random."""
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    return folder
