"""What the endpoint serves: the engine's intake, the tokenizer, the models' names, and what is counted."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.chat import PLAIN_TEMPLATE
from launch.inference.intake import Intake
from launch.inference.server.errors import ApiError
from launch.inference.server.metrics import EngineFigures, Metrics
from launch.inference.server.speech import form_of
from launch.inference.server.vocabulary import Vocabulary

if TYPE_CHECKING:
    from launch.inference.server.asking import Asked

POLL = 0.05


@dataclass(frozen=True)
class Defaults:
    """How tokens are drawn where a request does not say: what the model's generation_config.json recommends, else OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of_model(cls, folder: Path) -> Defaults:
        """As the model in `folder` recommends. One without do_sample says nothing of how to draw."""
        from transformers import GenerationConfig

        try:
            told = GenerationConfig.from_pretrained(folder)
        except OSError:
            return cls()
        if not told.do_sample:
            return cls()
        found = {name: getattr(told, name, None) for name in cls.__dataclass_fields__}
        return cls(**{name: value for name, value in found.items() if value is not None})


@dataclass
class Service:
    """One served model: `adapters` has the adapter of each name, None for the base model's."""

    intake: Intake
    tokenizer: Any
    adapters: Mapping[str, str | None]
    defaults: Defaults
    max_model_len: int
    version: str
    seed: int = 0
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary(self.tokenizer)
        self.open: set[Asked] = set()  # the HTTP requests that are being answered
        self.template = str(self.tokenizer.chat_template or PLAIN_TEMPLATE)
        self._seeds = random.Random(self.seed)  # noqa: S311 - the recipe's seed: the same requests are drawn alike

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the models."""
        return tuple(self.adapters)

    @property
    def base(self) -> str:
        """The name of the model without any adapter."""
        return next(name for name, adapter in self.adapters.items() if adapter is None)

    def adapter_of(self, name: str) -> str | None:
        """The adapter that a model's name stands for.

        Raises:
            ApiError: 404, there is no such model.
        """
        if name not in self.adapters:
            known = ", ".join(self.names)
            raise ApiError(
                404, f"no model {name[:100]!r} here; there is {known}", param="model", code="model_not_found"
            )
        return self.adapters[name]

    def described(self, name: str) -> dict[str, Any]:
        """A model, as OpenAI describes one."""
        about = {"id": name, "object": "model", "created": self.created, "owned_by": "sparkctl"}
        parent = {} if self.adapters[name] is None else {"parent": self.base}
        return {**about, "max_model_len": self.max_model_len, **parent}

    def new_seed(self) -> int:
        """For a request that brings none."""
        return self._seeds.randrange(2**53)

    @property
    def speaks_in_channels(self) -> bool:
        """Whether the model marks its messages by special tokens, which must then be part of the text."""
        return form_of(self.template, tools=False).channels

    @property
    def vocabulary_size(self) -> int:
        """How many token ids there are."""
        return self.intake.vocabulary

    def decode(self, ids: Any) -> str:
        """Token ids as text."""
        return str(self.tokenizer.decode(ids))

    def alive(self) -> bool:
        """Whether the engine works."""
        return self.intake.alive

    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.alive() and not self.intake.draining

    def figures(self) -> EngineFigures:
        """Where the engine stands."""
        stats = self.intake.stats()
        return EngineFigures(stats.waiting, stats.running, stats.kv_use, stats.busy)

    async def drain(self, within: float) -> None:
        """Take nothing new; wait until what runs has ended, but not longer than `within` seconds, then end it."""
        self.intake.drain()
        deadline = time.monotonic() + within
        while self.alive() and time.monotonic() < deadline:
            stats = self.intake.stats()
            if stats.waiting == stats.running == 0 and not self.open:
                return
            await asyncio.sleep(POLL)
        for asked in list(self.open):
            asked.give_up(ApiError(503, "the server has stopped before this answer's end", code="stopped"))
