"""What a check found: how it looks, the evidence, and the fix."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How it looks. Unknown is not failed: the check could not look."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finding:
    """`check` names what was looked at, `node` where (None: the pair), `evidence` what was seen, `fix` what to do."""

    check: str
    level: Level
    node: str | None
    evidence: str
    fix: str = ""
