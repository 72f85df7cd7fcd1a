"""Modules of ours that a node's Python runs, sent on its standard input: nothing is installed there, nothing is left behind.

They use the standard library and each other only, and any Python from 3.8.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_BOOT = (
    "import json, sys, types; m = json.loads(sys.stdin.buffer.readline()); "
    "[exec(compile(t, n, 'exec'), sys.modules.setdefault(n, types.ModuleType(n)).__dict__) for n, t in m]; "
    "sys.modules[m[-1][0]].main()"
)


def argv(python: str, *, site: bool = False) -> list[str]:
    """The command that takes in modules and calls `main` of the last, to which the rest of standard input belongs.

    Isolated and without site: nothing that lies about on the node passes for a module. With `site` the packages of that Python's
    environment may be imported.
    """
    return [python, "-I" if site else "-IS", "-c", _BOOT]


def modules(names: Sequence[str]) -> bytes:
    """The modules as `argv` takes them: one line. Each comes after those that it imports."""
    found = []
    for name in names:
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        found.append([name, Path(spec.origin).read_text(encoding="utf-8")])
    return json.dumps(found).encode() + b"\n"
