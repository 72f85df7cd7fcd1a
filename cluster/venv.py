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
    # Without a cache: what was not shown must not stay behind in the user's home.
    wanted = ["--no-cache-dir", "--constraint", str(constraints), *source, *packages]
    if uv:
        return (
            [uv, "venv", "--quiet", "--no-cache", "--python", f">={LEAST[0]}.{LEAST[1]}", str(folder)],
            [uv, "pip", "install", "--quiet", "--python", python, *wanted],
        )
    return ([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted],)


def lacking(wheelhouse: Path, packages: tuple[str, ...]) -> str:
    """What a folder of wheels has none of, in words; pip itself speaks of a conflict then. Empty if it has all."""
    if not wheelhouse.is_dir():
        return f"{wheelhouse}: no such folder on this node"
    there = {file.name.partition("-")[0].lower().replace("_", "-") for file in wheelhouse.iterdir()}
    missing = [name for name in packages if name.lower().replace("_", "-") not in there]
    return f"{wheelhouse}: holds no wheel of {', '.join(missing)}" if missing else ""


def main(folder: str, constraints: str, uv: str, wheelhouse: str, *packages: str) -> None:
    """Make it, or end with what went wrong; whoever called removes what was half made."""
    missing = lacking(Path(wheelhouse), packages) if wheelhouse else ""
    if missing:
        sys.exit(missing)
    if not uv:
        if sys.version_info < LEAST:
            sys.exit(f"Python {sys.version.split()[0]} is too old: install uv, or Python 3.11 or later")
        try:
            venv.create(folder, with_pip=True)
        except (subprocess.CalledProcessError, ImportError):
            sys.exit(
                f"{sys.executable} cannot put pip into an environment: `sudo apt install python3-venv`, or install uv"
            )
    for argv in steps(Path(folder), Path(constraints), uv, wheelhouse, packages):
        status = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
