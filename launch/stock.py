"""What sparkctl keeps on a node: jobs, halves of models, code. Looked at, and removed piece by piece.

Sent to the nodes (see cluster.transport.shipped): standard library only, any Python from 3.8. `main` takes one order, one line of
JSON: ["look", HOME] or ["remove", HOME, [PATH, ...]] with paths relative to HOME, and answers one line of JSON.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = "\x1e"
ROOMS = ("jobs", "halves", "code", "tokens")
ENDED = ("succeeded", "failed", "stopped")
_RESULTS = ("adapter", "model", "checkpoints")
_STILL = (
    3600.0  # seconds: a job without an agent, or a copy that nobody continues, is not in its first moments any more
)


def look(home: str) -> dict[str, Any]:
    """Everything that could be in the way; sizes in bytes, on the disk."""
    root = Path(home)
    return {
        "code": _pair_code(root),
        "jobs": [_job(path) for path in _children(root / "jobs")],
        "halves": [_half(path) for path in _children(root / "halves")],
        "codes": [{"name": path.name, "size": _size(path)} for path in _children(root / "code")],
        "tokens": [{"name": path.name, "size": _size(path)} for path in _children(root / "tokens")],
    }


def remove(home: str, names: list[str]) -> list[str]:
    """Remove folders; what is in use by now is left. Returns what was removed."""
    done = []
    for name in names:
        room, _, child = name.partition("/")
        path = Path(home) / room / child
        if room not in ROOMS or not child or "/" in child or child in (".", "..") or path.is_symlink():
            continue
        lock = {"jobs": "agent.lock", "halves": ".lock"}.get(room)
        if lock is not None and _is_locked(path / lock):
            continue
        shutil.rmtree(str(path), ignore_errors=True)
        if not path.exists():
            done.append(name)
    return done


def _pair_code(root: Path) -> str:
    try:
        return str(json.loads((root / "pair.json").read_text())["code"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _job(path: Path) -> dict[str, Any]:
    spec, state = _text(path / "spec.json"), _text(path / "state.json")
    try:
        said = str(json.loads(state)["state"])
    except (ValueError, KeyError, TypeError):
        said = ""
    quiet = time.time() - path.stat().st_mtime > _STILL
    alive = _is_locked(path / "agent.lock")
    return {
        "name": path.name,
        "size": _size(path),
        "ended": not alive and (said in ENDED or quiet),
        "state": said,
        "results": [name for name in _RESULTS if (path / name).is_dir() and any((path / name).iterdir())],
        "spec": spec,
    }


def _half(path: Path) -> dict[str, Any]:
    return {
        "name": path.name,
        "size": _size(path),
        "unfinished": path.name.startswith("."),
        "busy": _is_locked(path / ".lock"),
    }


def _children(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            yield path


def _size(folder: Path) -> int:
    total = 0
    for above, _, names in os.walk(str(folder)):
        for name in names:
            try:
                total += os.lstat(os.path.join(above, name)).st_blocks * 512  # noqa: PTH118 - a hundred times faster
            except OSError:
                continue
    return total


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def main() -> None:
    """Answer one order."""
    order, *arguments = json.loads(sys.stdin.buffer.readline())
    answer: Any = look(*arguments) if order == "look" else remove(*arguments)
    print(MARK + json.dumps(answer), flush=True)  # noqa: T201 - the answer
