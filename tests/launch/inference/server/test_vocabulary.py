"""Single tokens are told with their own bytes, whatever kind of vocabulary they are of."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, decoders, models

from launch.inference.server.vocabulary import Vocabulary
from tests import models as tiny


def test_byte_level_tokens_are_their_bytes() -> None:
    tokenizer = tiny.tokenizer()
    vocabulary = Vocabulary(tokenizer)
    text = "a é 你\n\x00"
    ids = tokenizer(text).input_ids
    assert b"".join(vocabulary.bytes_of(token) for token in ids) == text.encode()
    assert vocabulary.text_of(ids[0]) == "a"
    assert vocabulary.text_of(ids[2]) == "bytes:\\xc3"
    assert vocabulary.text_of(256) == "<end>"
    assert len({vocabulary.text_of(token) for token in range(258)}) == 258
    assert vocabulary.bytes_of(263) == b""  # the embedding has more rows than the vocabulary


def test_sentencepiece_tokens_are_their_bytes() -> None:
    words = {"<unk>": 0, "▁Hello": 1, "▁": 2, "<0xE4>": 3, "<0xBD>": 4, "<0xA0>": 5, "lo": 6}
    plain = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True, unk_token="<unk>"))
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = Vocabulary(transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>"))
    assert b"".join(vocabulary.bytes_of(token) for token in (1, 2, 3, 4, 5, 6)) == " Hello 你lo".encode()
    assert vocabulary.text_of(3) == "bytes:\\xe4"
