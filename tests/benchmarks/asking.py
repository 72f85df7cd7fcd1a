"""A rank's engine driven through its intake, as the server does it, and what is measured of the answers."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from launch import model_card
from launch.inference.engine import Follower, Leader
from launch.inference.intake import Event, Failed, Finished, Intake, Limits, Tokens
from launch.inference.request import GenerationRequest
from launch.shard.stage import Stage
from launch.split import balance, whole
from tests import models

WITHIN = 300.0
_ids = itertools.count()


def load(folder: Path, rank: int, stages: int) -> Stage:
    """The whole model, or one rank's part of it, in float32."""
    disable_progress_bar()
    card = model_card.read(folder)
    cuts = balance(card.layer_bytes, stages=stages, embedding_cost=card.embedding_bytes, head_cost=card.head_cost)
    cut = cuts[rank] if stages > 1 else whole(card.layers)
    return Stage.load(folder, cut, dtype=torch.float32, device=torch.device("cpu"))


class Rank:
    """One rank's engine in a thread of its own. Rank 0, or a rank that holds the whole model, can be asked."""

    def __init__(self, stage: Stage, rank: int, *, slots: int, chunk: int, longest: int) -> None:
        self.intake = Intake(Limits(longest, max_waiting=4096))
        self._leads = rank == 0 or stage.cut.whole
        self._leader: Leader | None = None
        if self._leads:
            self._leader = Leader(
                stage,
                self.intake,
                models.tokenizer(),
                slots=slots,
                chunk=chunk,
                stop=frozenset(),
            )
            run: Callable[[], None] = self._leader.run
        else:
            run = Follower(stage, slots=slots, longest=longest).run
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def ask(self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Timeline:
        """Answer all prompts, greedily and to their full lengths; nothing on a rank that follows."""
        timeline = Timeline(len(prompts))
        if self._leads:
            for prompt, count in zip(prompts, new_tokens, strict=True):
                self.submit(prompt, count, timeline)
            timeline.wait()
        return timeline

    def submit(self, prompt: Sequence[int], count: int, timeline: Timeline) -> None:
        """Ask for one more answer."""
        request = GenerationRequest(id=str(next(_ids)), prompt=tuple(prompt), max_tokens=count)
        timeline.asked[request.id] = time.perf_counter()
        self.intake.submit(request, timeline.note)

    def close(self) -> None:
        """End the engine; on a rank that follows, wait until the leading one has."""
        self.intake.close()
        self._thread.join(WITHIN)


@dataclass
class Timeline:
    """When each token of each answer came, in seconds of the performance counter."""

    expected: int
    asked: dict[str, float] = field(default_factory=dict)
    came: dict[str, list[float]] = field(default_factory=dict)
    ended: int = 0
    failure: str = ""
    done: threading.Event = field(default_factory=threading.Event)

    def note(self, event: Event) -> None:
        """Called from the engine's thread."""
        if isinstance(event, Tokens) and event.count:
            self.came.setdefault(event.id, []).extend([time.perf_counter()] * event.count)
        elif isinstance(event, Failed):
            self.failure = event.message
            self.done.set()
        elif isinstance(event, Finished):
            self.ended += 1
            if self.ended == self.expected:
                self.done.set()

    def wait(self) -> None:
        """Until every answer has ended."""
        assert self.done.wait(WITHIN), "the engine has not answered in time"
        assert not self.failure, self.failure

    @property
    def seconds(self) -> float:
        """From the first question to the last token."""
        return max(times[-1] for times in self.came.values()) - min(self.asked.values())

    @property
    def tokens(self) -> int:
        """How many came."""
        return sum(len(times) for times in self.came.values())

    @property
    def decode_speed(self) -> float:
        """Tokens/s while all answers were being written: prompts are read by then, and no stage waits for its first step."""
        began = max(times[0] for times in self.came.values())
        ended = min(times[-1] for times in self.came.values())
        return sum(began < time <= ended for times in self.came.values() for time in times) / (ended - began)

    def first_after(self, request: str) -> float:
        """Seconds from a question to its first token."""
        return self.came[request][0] - self.asked[request]


class Sent:
    """Bytes that this rank has handed to `isend` and `send`."""

    def __init__(self) -> None:
        self.total = 0
        isend, send = dist.isend, dist.send

        def counted(real: Any) -> Any:
            def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self.total += tensor.numel() * tensor.element_size()
                return real(tensor, *args, **kwargs)

            return call

        dist.isend, dist.send = counted(isend), counted(send)
