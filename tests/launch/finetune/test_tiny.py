"""The model that the demo makes is an ordinary model folder."""

from __future__ import annotations

from pathlib import Path

import transformers

from launch import model_card
from launch.finetune import tiny

TEXTS = ["json.dumps: Serialize obj to a JSON formatted str.", "abc: Abstract Base Classes according to PEP 3119."] * 20


def test_a_tiny_model_is_read_by_transformers_and_by_us(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "base", TEXTS, vocabulary=300, hidden=64, layers=3, positions=32, seed=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    card = model_card.read(folder)
    assert card.layers == 3
    assert card.max_positions == 32
    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert tokenizer.decode(tokenizer("naïve ✓").input_ids) == " naïve ✓", (
        "a word has its space, at the start of a line too"
    )


def test_the_same_seed_makes_the_same_weights(tmp_path: Path) -> None:
    made = [
        tiny.make(tmp_path / name, TEXTS, vocabulary=300, hidden=64, layers=2, positions=32, seed=5)
        for name in ("one", "two")
    ]
    one, two = ((folder / "model.safetensors").read_bytes() for folder in made)
    assert one == two
