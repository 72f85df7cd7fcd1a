"""The Python environment of the ranks, made on a node: `python venv.py FOLDER CONSTRAINTS UV WHEELHOUSE PACKAGE...`.

Run on the node by its own Python, out of the code that was shipped: standard library only, any Python from 3.8. UV is the path of
uv, or empty for pip; WHEELHOUSE a folder of wheels on the node, or empty for the package index.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

LEAST = (3, 11)


def steps(
    folder: Path, constraints: Path, uv: str, wheelhouse: str, packages: tuple[str, ...]
) -> tuple[list[str], ...]:
    """The commands that fill the environment. Pure."""
    source = ["--no-index", "--find-links", wheelhouse] if wheelhouse else []
    python = str(folder / "bin" / "python")
    wanted = ["--constraint", str(constraints), *source, *packages]
    if uv:
        return (
            [uv, "venv", "--quiet", "--python", f">={LEAST[0]}.{LEAST[1]}", str(folder)],
            [uv, "pip", "install", "--quiet", "--python", python, *wanted],
        )
    return ([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted],)


def main(folder: str, constraints: str, uv: str, wheelhouse: str, *packages: str) -> None:
    """Make it, or end with what went wrong; whoever called removes what was half made."""
    if not uv:
        if sys.version_info < LEAST:
            sys.exit(f"Python {sys.version.split()[0]} is too old: install uv, or Python 3.11 or later")
        venv.create(folder, with_pip=True)
    for argv in steps(Path(folder), Path(constraints), uv, wheelhouse, packages):
        status = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
