"""Single tokens as clients see them: their bytes, and their text, which of a part of a character is `bytes:\\xe2`."""

from __future__ import annotations

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """What each token of a tokenizer stands for.

    Byte-level vocabularies write every byte as a character of its own (GPT-2's table); sentencepiece's write a space as U+2581,
    and a byte that is no whole character as `<0xE2>`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_tokens)
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._table = _byte_table() if "ByteLevel" in repr(decoder) else None

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; of an end mark, its name."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # rows of the embedding beyond the vocabulary
            return b""
        if piece in self._special:
            return str(piece).encode()
        if self._table is not None:
            known = [self._table.get(character) for character in piece]
            return bytes(b for b in known if b is not None) if None not in known else str(piece).encode()
        if single := _BYTE.fullmatch(piece):
            return bytes([int(single[1], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def text_of(self, token: int) -> str:
        """A token alone, as text that no other token of the vocabulary has."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_table() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, all others for those from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}
