"""The door between whoever asks and the engine's thread: requests go in from any thread, events come back from the engine's.

No torch: the server and its tests import this without a model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.inference.request import GenerationRequest, Sampling

__all__ = [
    "Draining",
    "Event",
    "Failed",
    "Finished",
    "GenerationRequest",
    "Intake",
    "Limits",
    "QueueFull",
    "Sampling",
    "Scored",
    "Stats",
    "Tokens",
    "TooLong",
]


class TooLong(Exception):
    """The request can never be served: prompt and answer do not fit, or it names what is not there."""


class QueueFull(Exception):
    """As many requests wait as may; one may be sent again later."""


class Draining(Exception):
    """Nothing new is taken."""


@dataclass(frozen=True)
class Scored:
    """A token with its log probability, and the likeliest ones in its place, best first. A prompt's first token has neither."""

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Event:
    """Something that happened to the request `id`."""

    id: str


@dataclass(frozen=True)
class Tokens(Event):
    """New tokens: `count` of them, the text that they complete (which may be none yet), their ids, and their scores if asked for.

    The scores of a prompt come first, in an event with count 0. `cached` tells, in the first event, how many of the prompt's tokens
    were not computed again.
    """

    text: str
    count: int
    scored: Sequence[Scored] = ()
    ids: tuple[int, ...] = ()
    cached: int = 0


@dataclass(frozen=True)
class Finished(Event):
    """The last event of a request: `stop` or `length`."""

    reason: str


@dataclass(frozen=True)
class Failed(Event):
    """The last event of a request that the engine could not finish."""

    message: str


@dataclass(frozen=True)
class Stats:
    """Where the engine stands. `kv_use` is the share of the cache in use; `busy` the share of late that each stage computed."""

    waiting: int = 0
    running: int = 0
    kv_use: float = 0.0
    busy: tuple[float, ...] = ()
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preempted: int = 0


@dataclass(frozen=True)
class Limits:
    """What the engine can take: tokens of a sequence, requests that may wait, token ids there are, the adapters' names."""

    max_model_len: int
    max_waiting: int = 256
    vocabulary: int = 1 << 62
    adapters: tuple[str, ...] = ()


OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Arrival:
    """A request that was let in, and where its events go."""

    request: GenerationRequest
    on_event: OnEvent


class Intake:
    """Takes requests for one engine; every method is safe to call from any thread."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._changed = threading.Condition()
        self._arrivals: list[Arrival] = []
        self._cancelled: list[str] = []
        self._queued = 0
        self._draining = self._closed = self._dead = False
        self._stats = Stats()

    # ---- whoever asks

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """Hand a request to the engine; `on_event` is called from its thread and must return at once.

        Raises:
            TooLong: it can never be served.
            QueueFull: as many requests wait as may.
            Draining: the engine stops, or is gone.
        """
        self._check(request)
        with self._changed:
            if self._draining or self._dead:
                raise Draining("the server is stopping and takes nothing new")
            if self._queued + len(self._arrivals) >= self.limits.max_waiting:
                raise QueueFull(f"{self.limits.max_waiting} requests are waiting already")
            self._arrivals.append(Arrival(request, on_event))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request without another word; unknown ones are ignored. Its slot is free before the next step."""
        with self._changed:
            self._arrivals = [arrival for arrival in self._arrivals if arrival.request.id != request_id]
            self._cancelled.append(request_id)
            self._changed.notify_all()

    def drain(self) -> None:
        """Take nothing new; what is in goes on."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def close(self) -> None:
        """Take nothing new, and let the engine's thread end once it has finished what it runs."""
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify_all()

    def stats(self) -> Stats:
        """Where the engine stood after its last step."""
        with self._changed:
            late = len(self._arrivals)
            return Stats(**{**vars(self._stats), "waiting": self._stats.waiting + late})

    @property
    def alive(self) -> bool:
        """Whether the engine works."""
        return not self._dead

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self._draining

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self.limits.vocabulary

    def _check(self, request: GenerationRequest) -> None:
        room = self.limits.max_model_len - len(request.prompt)
        if not request.prompt:
            raise TooLong("the prompt is empty")
        if request.max_tokens < 0 or (request.max_tokens == 0 and request.prompt_logprobs is None):
            raise TooLong("nothing is asked for: max_tokens must be at least 1")
        if room < max(1, request.max_tokens):
            raise TooLong(
                f"at most {self.limits.max_model_len} tokens fit, prompt and answer together; "
                f"this has {len(request.prompt)} in the prompt and asks for {request.max_tokens}"
            )
        if not all(0 <= token < self.limits.vocabulary for token in request.prompt):
            raise TooLong(f"token ids must lie between 0 and {self.limits.vocabulary - 1}")
        if request.adapter is not None and request.adapter not in self.limits.adapters:
            raise TooLong(f"there is no adapter {request.adapter!r}")

    # ---- the engine

    def collect(self, *, wait: float = 0.0) -> tuple[list[Arrival], list[str]]:
        """What came since the last time: requests, and the ids of cancelled ones. Waits up to `wait` seconds for something."""
        with self._changed:
            if wait and not (self._arrivals or self._cancelled or self._closed):
                self._changed.wait(wait)
            arrivals, cancelled = self._arrivals, self._cancelled
            self._arrivals, self._cancelled = [], []
            self._queued += len(arrivals)
            return arrivals, cancelled

    def tell(self, stats: Stats) -> None:
        """Where the engine stands now."""
        with self._changed:
            self._stats = stats
            self._queued = stats.waiting

    @property
    def closed(self) -> bool:
        """Whether the engine's thread is to end once nothing runs."""
        return self._closed

    def die(self) -> list[Arrival]:
        """The engine is gone: nothing more is taken. Returns what it never saw."""
        with self._changed:
            self._dead = True
            arrivals, self._arrivals = self._arrivals, []
            return arrivals
