"""An answer is told piece by piece, in whole characters, and the pieces are the answer."""

from __future__ import annotations

import random
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from launch.inference.text import Text
from tests import models

BYTES = models.tokenizer()
STOP = frozenset({256})
TEXT = "Größe: 3 µm, 42 €, 你好, 👩‍👩‍👧 and e\u0301. "


def _pieces(tokenizer: Any, tokens: list[int], stop: frozenset[int] = STOP) -> list[str]:
    text = Text(tokenizer)
    last = len(tokens) - 1
    return [text.add(None if token in stop else token, last=index == last) for index, token in enumerate(tokens)]


def test_characters_come_out_whole_however_tokens_split_them() -> None:
    tokens = BYTES(TEXT).input_ids
    assert len(tokens) == len(TEXT.encode()), "each byte is a token"
    pieces = _pieces(BYTES, tokens)
    assert "".join(pieces) == TEXT
    assert [piece for piece in pieces if piece] == list(TEXT)
    assert pieces[:4] == ["G", "r", "", "ö"]


def test_tokens_that_end_in_the_middle_of_a_character_wait_for_its_rest() -> None:
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator(["a€ a€ a₤ a₤ 👩👩 👨👨"] * 4, trainer)
    merged = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)
    text = "a€👩a₤👨a€ 👩👨 a"
    tokens = merged(text).input_ids
    assert any("\ufffd" in merged.decode([token]) and len(merged.convert_ids_to_tokens(token)) > 1 for token in tokens)
    pieces = _pieces(merged, tokens, frozenset())
    assert "".join(pieces) == text == merged.decode(tokens)
    assert "\ufffd" not in "".join(pieces)


def test_the_pieces_of_any_tokens_are_what_decoding_all_of_them_gives() -> None:
    draw = random.Random(5)  # noqa: S311 - reproducible, not secret
    for _ in range(50):
        tokens = [draw.randrange(256) for _ in range(40)]  # mostly no valid text at all
        assert "".join(_pieces(BYTES, tokens)) == BYTES.decode(tokens)


def test_a_stop_text_ends_the_answer_and_what_may_begin_one_waits() -> None:
    text = Text(BYTES, stop=("END", "###"))
    told = [text.add(token, last=False) for token in BYTES("a E b#").input_ids]
    assert told == ["a", " ", "", "E ", "b", ""]
    assert [text.add(token, last=False) for token in BYTES("# END").input_ids][-1] == ""
    assert text.stopped


def test_half_a_character_at_the_very_end_is_told_as_such() -> None:
    tokens = BYTES("42 €").input_ids[:-1]
    assert _pieces(BYTES, tokens)[-1] == "\ufffd"
    assert "".join(_pieces(BYTES, tokens)) == "42 \ufffd"


def test_an_end_token_is_never_told() -> None:
    tokens = BYTES("Done").input_ids
    assert "".join(_pieces(BYTES, [*tokens, 256])) == "Done"
    cut = BYTES("42 €").input_ids[:-1]
    assert "".join(_pieces(BYTES, [*cut, 256])) == "42 \ufffd"


def test_special_tokens_that_end_nothing_are_not_told_either() -> None:
    hello = BYTES("Hello").input_ids
    assert "".join(_pieces(BYTES, [*hello[:2], 257, *hello[2:]])) == "Hello"
