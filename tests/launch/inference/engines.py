"""An engine over two ranks, or whole in one, for tests: it is asked through its intake, as the server asks it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from launch import model_card
from launch.inference.engine import Follower, Leader
from launch.inference.intake import Event, Failed, Finished, Intake, Limits, Tokens
from launch.inference.request import GenerationRequest
from launch.shard.stage import Stage
from launch.split import balance
from tests import models

SLOTS, CHUNK, LONGEST = 6, 16, 128


@dataclass
class Heard:
    """All that was told of the answers."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    events: dict[str, list[Event]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def note(self, event: Event) -> None:
        """Called from the engine's thread."""
        with self.changed:
            self.events.setdefault(event.id, []).append(event)
            if isinstance(event, Tokens):
                self.tokens.setdefault(event.id, []).extend(event.ids)
            elif isinstance(event, Finished):
                self.reasons[event.id] = event.reason
            elif isinstance(event, Failed):
                self.reasons[event.id] = f"failed: {event.message}"
            self.changed.notify_all()

    def wait(self, reached: Callable[[], bool], seconds: float = 240) -> None:
        """Until something holds, looked at after each event."""
        with self.changed:
            assert self.changed.wait_for(reached, seconds), f"only {sorted(self.reasons)} have ended"


def stage(folder: Path, rank: int, world: int) -> Stage:
    """One rank's part of the model, in float32."""
    card = model_card.read(folder)
    cuts = balance(card.layer_bytes, stages=world, embedding_cost=card.embedding_bytes, head_cost=card.head_cost)
    return Stage.load(folder, cuts[rank], dtype=torch.float32, device=torch.device("cpu"))


def serve(
    rank: int,
    loaded: Stage,
    ask: Callable[[Intake, Heard], None],
    *,
    slots: int = SLOTS,
    chunk: int = CHUNK,
    longest: int = LONGEST,
    stop: frozenset[int] = frozenset(),
    adapters: Any = None,
    room: int | None = None,
) -> Heard:
    """Run an engine, on rank 0 for as long as `ask` takes."""
    heard = Heard()
    if rank > 0:
        Follower(loaded, slots=slots, longest=longest, chooser=adapters).run()
        return heard
    names = {} if adapters is None else adapters.numbers
    intake = Intake(Limits(max_model_len=longest, max_waiting=1000, vocabulary=264, adapters=tuple(names)))
    leader = Leader(
        loaded,
        intake,
        models.tokenizer(),
        slots=slots,
        chunk=chunk,
        stop=stop,
        room=room,
        adapters=names,
        chooser=adapters,
    )
    thread = threading.Thread(target=leader.run)
    thread.start()
    try:
        ask(intake, heard)
    finally:
        intake.close()
        thread.join(120)
    if leader.failure is not None:
        raise leader.failure
    return heard


def ask_all(intake: Intake, heard: Heard, requests: Sequence[GenerationRequest]) -> None:
    """Ask everything at once and wait for all of it."""
    for request in requests:
        intake.submit(request, heard.note)
    heard.wait(lambda: len(heard.reasons) == len(requests))


def pause(seconds: float) -> None:
    """A moment between two requests; nothing hangs on how long it is."""
    time.sleep(seconds)
