"""What lies in a folder, byte for byte: to tell whether anything is different from before."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def snapshot(*roots: Path) -> dict[str, tuple[object, ...]]:
    """Every path below `roots`: its type, mode, owner and content, and a file's time of modification."""
    found: dict[str, tuple[object, ...]] = {}
    for root in roots:
        for folder, folders, files in os.walk(root):
            for name in (".", *folders, *files):
                path = Path(folder) / name
                at = path.lstat()
                kept: tuple[object, ...] = (oct(at.st_mode), at.st_uid, at.st_gid)
                if path.is_symlink():
                    kept += (str(path.readlink()),)
                elif path.is_file():
                    kept += (at.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
                found[str(path)] = kept
    return found
