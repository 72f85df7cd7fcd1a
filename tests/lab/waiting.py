"""Waiting for what takes a moment."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(true: Callable[[], object], timeout: float = 8, what: str = "it") -> None:
    """Ask again and again until ``true`` answers so. Raises TimeoutError after ``timeout`` s."""
    end = time.monotonic() + timeout
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come true within {timeout:g} s")
        time.sleep(0.01)
