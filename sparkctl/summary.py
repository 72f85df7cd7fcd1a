"""What a fine-tune came to, in a few lines: made of the metrics that its owner has seen go by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """The first and the last word of a run; `evaluation` is its last evaluation, if there was one."""

    first: dict[str, Any]
    last: dict[str, Any]
    tokens_per_s: float
    evaluation: dict[str, Any] | None = None

    @classmethod
    def of(cls, entries: Sequence[dict[str, Any]]) -> Summary | None:
        """From the lines of metrics.jsonl; None: no step was logged."""
        steps = [entry for entry in entries if "loss" in entry]
        if not steps:
            return None
        speeds = sorted(entry["tokens_per_s"] for entry in steps)
        evaluations = [entry for entry in entries if "eval_loss" in entry]
        return cls(steps[0], steps[-1], speeds[len(speeds) // 2], evaluations[-1] if evaluations else None)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values, in the order in which they are shown."""
        last = self.last
        found = [
            ("steps", f"{last['step']} of {last['total_steps']}, {last['epoch']:.3g} epochs"),
            ("loss", f"{self.first['loss']:.4f} -> {last['loss']:.4f}, token accuracy {last['token_accuracy']:.1%}"),
        ]
        if self.evaluation is not None:
            loss, accuracy = self.evaluation["eval_loss"], self.evaluation["eval_token_accuracy"]
            found.append(("evaluation", f"loss {loss:.4f}, token accuracy {accuracy:.1%}"))
        found.append(("speed", f"{self.tokens_per_s:,.0f} tokens/s"))
        if last.get("seconds"):
            found.append(("time", duration(last["seconds"])))
        return found + [(name, value) for name, value in vitals(last) if value]

    def lines(self) -> list[str]:
        """As they are printed, aligned with what is said of the result."""
        return [f"{name:<12} {value}" for name, value in self.rows()]


def vitals(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """How busy the ranks are and what memory they hold, in words; empty where nobody has told."""
    from sparkctl.show import size

    busy = " + ".join(f"{share:.0%}" for share in entry.get("busy") or ())
    memory = " + ".join(size(most) for most in entry.get("memory") or ())
    return [("busy", busy), ("memory", memory)]


def duration(seconds: float) -> str:
    """1:02:03, 2:03 or 3.4 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
