"""Wheels for a pair without internet: what is installed here packed again, and empty ones in place of what is large."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path


def pack(folder: Path, name: str) -> Path:
    """The distribution `name` as it is installed here, as a wheel."""
    found = importlib.metadata.distribution(name)
    wheel = found.read_text("WHEEL")
    assert wheel is not None
    tag = next(line.partition(": ")[2] for line in wheel.splitlines() if line.startswith("Tag: "))
    contents = {
        str(file): Path(str(file.locate())).read_bytes()
        for file in found.files or ()
        if ".." not in file.parts and "__pycache__" not in file.parts and file.name not in ("RECORD", "INSTALLER")
    }
    return _write(folder, found.metadata["Name"], found.version, tag, contents)


def hollow(folder: Path, name: str) -> Path:
    """A wheel of the version of `name` that is installed here, with nothing in it."""
    version = importlib.metadata.version(name)
    info = f"{_normal(name)}-{version}.dist-info"
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents = {f"{info}/{file}": text.encode() for file, text in texts.items()}
    return _write(folder, name, version, "py3-none-any", contents)


def _normal(name: str) -> str:
    return name.replace("-", "_").replace(".", "_")


def _write(folder: Path, name: str, version: str, tag: str, contents: dict[str, bytes]) -> Path:
    info = next(path.partition("/")[0] for path in contents if path.partition("/")[0].endswith(".dist-info"))
    record = [f"{path},sha256={_hash(content)},{len(content)}" for path, content in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"{_normal(name)}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, content in contents.items():
            archive.writestr(inside, content)
    return path


def _hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
