"""Archives for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping


def tarball(files: Mapping[str, bytes]) -> bytes:
    """A tar archive of files by name; those whose content begins with #! are executable."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mode = 0o755 if content.startswith(b"#!") else 0o644
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()
