"""Requests sent to an endpoint on purpose, and what they took: for `bench serve`."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import FailedError, SparkctlError
from launch.inference.client import Client

PERCENTILES = (50, 90, 99)
# Ids that every vocabulary has.
_IDS = range(32, 256)


@dataclass(frozen=True)
class Load:
    """What to send. `rate` is in requests/s, at random moments as independent users come (Poisson); 0: as fast as answers end.

    Prompts are random token ids, so that none begins as another did.
    """

    requests: int = 32
    concurrency: int = 8
    rate: float = 0.0
    prompt_tokens: int = 64
    answer_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """One request, in seconds: from its sending to its first token, and to its last; and its tokens."""

    first: float
    last: float
    tokens: int

    @property
    def per_token(self) -> float | None:
        """The mean time from one token to the next."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class Result:
    """What all requests took. Percentiles in seconds, by their number."""

    load: Load
    answered: int
    failed: int
    seconds: float
    requests_per_s: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    first_token: dict[int, float]
    per_token: dict[int, float]
    whole: dict[int, float]
    first_failure: str = ""

    def document(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def run(client: Client, model: str, load: Load, *, progress: Callable[[int], None] = lambda _: None) -> Result:
    """Send the load and wait for every answer.

    Raises:
        FailedError: not one request was answered.
    """
    chance = random.Random(load.seed)  # noqa: S311 - a load that can be repeated
    prompts = [chance.choices(_IDS, k=load.prompt_tokens) for _ in range(load.requests)]
    moments = [0.0] * load.requests
    for index in range(1, load.requests):
        moments[index] = moments[index - 1] + (chance.expovariate(load.rate) if load.rate else 0.0)
    timings: list[Timing] = []
    failures: list[str] = []
    lock = threading.Lock()
    began = time.monotonic()

    def one(index: int) -> None:
        time.sleep(max(0.0, began + moments[index] - time.monotonic()))
        try:
            timing = _time(client, model, prompts[index], load.answer_tokens)
        except SparkctlError as error:
            with lock:
                failures.append(error.message)
        else:
            with lock:
                timings.append(timing)
                progress(len(timings))

    with ThreadPoolExecutor(load.concurrency) as pool:
        list(pool.map(one, range(load.requests)))
    seconds = time.monotonic() - began
    if not timings:
        raise FailedError(f"none of {load.requests} requests was answered: {failures[0]}", "sparkctl logs JOB")
    tokens = sum(timing.tokens for timing in timings)
    return Result(
        load,
        len(timings),
        len(failures),
        seconds,
        len(timings) / seconds,
        tokens / seconds,
        len(timings) * load.prompt_tokens / seconds,
        percentiles([timing.first for timing in timings]),
        percentiles([timing.per_token for timing in timings if timing.per_token is not None]),
        percentiles([timing.last for timing in timings]),
        failures[0] if failures else "",
    )


def _time(client: Client, model: str, prompt: Sequence[int], tokens: int) -> Timing:
    sent = time.monotonic()
    first = last = 0.0
    count = 0
    for piece in client.complete(prompt, model=model, tokens=tokens):
        if piece.tokens:  # the last event: what it took
            count = piece.tokens
        elif not piece.finish_reason:
            last = time.monotonic() - sent
            first = first or last
    return Timing(first, last, count)


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """The smallest value that so many percent of all are not above (nearest rank)."""
    ordered = sorted(values)
    return {share: ordered[max(0, -(-share * len(ordered) // 100) - 1)] for share in PERCENTILES} if ordered else {}
