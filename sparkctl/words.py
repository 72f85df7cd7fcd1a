"""What a model says, on a terminal."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def harmless(text: str) -> str:
    """Without control characters: what a model says must not move the cursor, or worse. `--json` has them, escaped."""
    return _CONTROL.sub("", text)
