"""Token ids into text, piece by piece, and up to a text that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Text:
    """The text of one answer; a piece ends where a character does, whatever bytes the tokens split.

    Only a window is decoded: the tokens of the last piece, for a token's text can depend on the one before, and the new ones.
    What may be the beginning of a stop text is held back until it is none.
    """

    def __init__(self, tokenizer: Any, *, stop: Sequence[str] = (), keep_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._keep_special = keep_special
        self._tokens: list[int] = []
        self._window = self._told = 0  # where the window starts, and up to where tokens have been told
        self._before = ""  # the text of the window's tokens that have been told
        self._held = ""
        self.stopped = False

    def add(self, token: int | None, *, last: bool) -> str:
        """The text that `token` completes, which may be none; with `last` all that was held back. None: no token of the text."""
        if token is not None:
            self._tokens.append(token)
        text = self._decode(self._tokens[self._window :])
        if not text.endswith("\ufffd") or last:
            piece = text[len(self._before) :]
            if piece:
                self._window, self._told = self._told, len(self._tokens)
                self._before = self._decode(self._tokens[self._window :])
            self._held += piece
        found = [self._held.find(stop) for stop in self._stop if stop in self._held]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if last else _beginning(self._held, self._stop)
        piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=not self._keep_special))


def _beginning(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)
