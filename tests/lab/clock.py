"""Skewing a host's wall clock: see clock.c."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

LIBRARY = "/usr/lib/sparklab/clock.so"
PRELOAD = "/etc/ld.so.preload"


def build(folder: Path) -> bytes:
    """Compile clock.c in ``folder``, once, and return the library."""
    library = folder / "clock.so"
    if not library.exists():
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-Wall", "-o", library, source], check=True)
    return library.read_bytes()


def encode(seconds: float) -> bytes:
    """The content of /etc/sparklab/skew."""
    return struct.pack("=q", round(seconds * 1e9))
