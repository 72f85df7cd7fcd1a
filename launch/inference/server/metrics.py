"""What Prometheus reads at /metrics (text format 0.0.4): counted here, and taken from the engine when asked."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# Seconds; a token of a 400B model on two boxes takes a tenth of one to a whole one.
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Histogram:
    """Counts of observations up to each bound."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> Iterator[str]:
        """Cumulative buckets, their sum and their count."""
        so_far = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            so_far += count
            yield f'{name}_bucket{{le="{"+Inf" if bound == float("inf") else f"{bound:g}"}"}} {so_far}'
        yield f"{name}_sum {self.total:.9g}"
        yield f"{name}_count {so_far}"


@dataclass(frozen=True)
class EngineFigures:
    """Where the engine stands at this moment."""

    waiting: int
    running: int
    kv_use: float
    busy: Sequence[float]


class Metrics:
    """All that is counted over the server's life; safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._finished: Counter[str] = Counter()
        self._prompt_tokens = self._generated_tokens = 0
        self._first_token = Histogram(FIRST_TOKEN)
        self._per_token = Histogram(PER_TOKEN)

    def answered(self, path: str, status: int) -> None:
        """A request was answered with this HTTP status."""
        with self._lock:
            self._requests[path, str(status)] += 1

    def generated(
        self, reason: str, *, prompt: int, tokens: int, first_after: float | None, seconds: float | None
    ) -> None:
        """An answer has ended: its tokens, the seconds to the first one, and from the first to the last."""
        with self._lock:
            self._finished[reason] += 1
            self._prompt_tokens += prompt
            self._generated_tokens += tokens
            if first_after is not None:
                self._first_token.observe(first_after)
            if seconds is not None and tokens > 1:
                self._per_token.observe(seconds / (tokens - 1))

    def text(self, engine: EngineFigures, *, model: str, version: str) -> str:
        """Everything, as Prometheus reads it."""
        with self._lock:
            return "\n".join([*self._counted(), *_engine(engine), *_info(model, version), ""])

    def _counted(self) -> Iterator[str]:
        yield from _head("http_requests_total", "counter", "Requests answered, by path and status.")
        for (path, status), count in sorted(self._requests.items()):
            yield f'sparkctl_http_requests_total{{path="{path}",status="{status}"}} {count}'
        yield from _head("answers_total", "counter", "Answers that have ended, by reason.")
        for reason, count in sorted(self._finished.items()):
            yield f'sparkctl_answers_total{{reason="{_escaped(reason)}"}} {count}'
        yield from _head("prompt_tokens_total", "counter", "Tokens of prompts.")
        yield f"sparkctl_prompt_tokens_total {self._prompt_tokens}"
        yield from _head("generated_tokens_total", "counter", "Tokens of answers.")
        yield f"sparkctl_generated_tokens_total {self._generated_tokens}"
        yield from _head("time_to_first_token_seconds", "histogram", "From a request's arrival to its first token.")
        yield from self._first_token.lines("sparkctl_time_to_first_token_seconds")
        yield from _head("time_per_token_seconds", "histogram", "An answer's mean time from one token to the next.")
        yield from self._per_token.lines("sparkctl_time_per_token_seconds")


def _engine(figures: EngineFigures) -> Iterator[str]:
    yield from _head("requests_waiting", "gauge", "Requests in the queue.")
    yield f"sparkctl_requests_waiting {figures.waiting}"
    yield from _head("requests_running", "gauge", "Requests that are being answered.")
    yield f"sparkctl_requests_running {figures.running}"
    yield from _head("kv_cache_use_ratio", "gauge", "The share of the memory for keys and values that is in use.")
    yield f"sparkctl_kv_cache_use_ratio {figures.kv_use:.6g}"
    yield from _head("stage_busy_ratio", "gauge", "The share of time in which a stage computes, of late.")
    for stage, share in enumerate(figures.busy):
        yield f'sparkctl_stage_busy_ratio{{stage="{stage}"}} {share:.6g}'


def _info(model: str, version: str) -> Iterator[str]:
    yield from _head("info", "gauge", "What runs here.")
    yield f'sparkctl_info{{model="{_escaped(model)}",version="{_escaped(version)}"}} 1'


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP sparkctl_{name} {what}"
    yield f"# TYPE sparkctl_{name} {kind}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
