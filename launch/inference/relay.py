"""Serving over the stages: every request is a sequence with caches of its own, and the sequences take turns on each stage.

While one is on the second stage, others are on the first. Rank 0 leads: it sends a header, and hidden states, for each step of a
sequence: a piece of its prompt, or one token. The last stage draws the token and returns it with the scores that were asked for.
Requests join and leave at any step; a long prompt goes in pieces, between which everybody else has a turn.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from transformers.cache_utils import DynamicCache

from launch.inference.intake import Arrival, Failed, Finished, Intake, Scored, Stats, Tokens
from launch.inference.request import GenerationRequest, Sampling
from launch.inference.sampler import Row, draw
from launch.inference.text import Text
from launch.shard.handoff import Handoff
from launch.shard.stage import Stage

CPU = torch.device("cpu")
HEADER_TAG = 0
# Seconds between two headers of an idle server: no receive may wait so long that the process group gives up.
IDLE_EVERY = 5.0
# Seconds over which the stages' shares of busy time are taken.
BUSY_OVER = 10.0


class Order(IntEnum):
    """What a header tells the following stages to do."""

    OPEN = 0  # the sequence is new: its facts and its prompt follow
    STEP = 1
    CLOSE = 2
    IDLE = 3
    END = 4


@dataclass(frozen=True)
class Step:
    """A header. `draw`: the last stage draws a token after this; `scores`: it scores the prompt's tokens in it."""

    order: Order
    slot: int = 0
    length: int = 0
    draw: bool = False
    scores: bool = False
    adapter: int = 0
    prompt: int = 0

    def pack(self) -> torch.Tensor:
        """As int64 [7]."""
        return torch.tensor(
            [self.order, self.slot, self.length, self.draw, self.scores, self.adapter, self.prompt], dtype=torch.int64
        )

    @classmethod
    def unpack(cls, header: torch.Tensor) -> Step:
        """What `pack` made."""
        order, slot, length, drawn, scores, adapter, prompt = header.tolist()
        return cls(Order(order), slot, length, bool(drawn), bool(scores), adapter, prompt)


# What the last stage must know of a sequence, as numbers: see `_facts`. Float64 holds integers up to 2**53 exactly.
FACTS = 10


def _facts(request: GenerationRequest) -> torch.Tensor:
    s = request.sampling
    told = [s.temperature, s.top_p, s.top_k, s.seed, s.min_p]
    told += [s.repetition_penalty, s.presence_penalty, s.frequency_penalty]
    tops = [-1 if k is None else k for k in (s.logprobs, request.prompt_logprobs)]
    return torch.tensor([*told, *tops], dtype=torch.float64)


@dataclass
class _Drawer:
    """The last stage's half of a sequence: how to draw, and what has been said."""

    sampling: Sampling
    top: int
    prompt_top: int
    prompt: list[int]
    scored: int = 1  # the prompt's tokens that have a score; the first never has one

    def __post_init__(self) -> None:
        self.row = Row(self.sampling, self.prompt)

    @classmethod
    def of(cls, facts: torch.Tensor, prompt: torch.Tensor) -> _Drawer:
        t, p, k, seed, least, repetition, presence, frequency, top, prompt_top = facts.tolist()
        sampling = Sampling(
            temperature=t,
            top_p=p,
            top_k=int(k),
            seed=int(seed),
            min_p=least,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        return cls(sampling, int(top), int(prompt_top), prompt.tolist())

    def rows(self, step: Step) -> int:
        """How many rows the answer to a step has."""
        scores = min(step.length, len(self.prompt) - self.scored) if step.scores else 0
        return 1 + scores + step.draw

    @property
    def width(self) -> int:
        """Token, log probability, and the likeliest ones."""
        return 2 + 2 * max(self.top, self.prompt_top, 0)

    def answer_to(self, step: Step, logits: torch.Tensor, busy: float) -> torch.Tensor:
        """float64 [rows, width] for logits [positions, vocabulary]: first how busy the stage has been, scores, then the token."""
        made = torch.zeros(self.rows(step), self.width, dtype=torch.float64)
        made[0, 0] = busy
        at = 1
        if step.scores:
            for position in range(made.shape[0] - 1 - step.draw):
                self._score(made[at], logits[position], self.prompt[self.scored], self.prompt_top)
                self.scored += 1
                at += 1
        if step.draw:
            row = logits[-1].float().cpu()
            (token,) = draw(row[None], [self.row])
            made[at, 0] = token
            if self.top >= 0:
                self._score(made[at], row, token, self.top)
        return made

    def _score(self, into: torch.Tensor, logits: torch.Tensor, token: int, top: int) -> None:
        shares = logits.float().cpu().log_softmax(-1)
        into[0], into[1] = token, shares[token]
        if top:
            best = shares.topk(top)
            into[2 : 2 + top], into[2 + top : 2 + 2 * top] = best.indices, best.values


@dataclass
class _Held:
    """What one stage keeps of a sequence."""

    cache: DynamicCache
    length: int = 0
    drawer: _Drawer | None = None


class _Busy:
    """The share of time that a stage computes."""

    def __init__(self) -> None:
        self.total = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.total += time.perf_counter() - self._began


class _Runner:
    """Runs one rank's stage for any sequence."""

    def __init__(self, stage: Stage, handoff: Handoff, choose: Callable[[int], None]) -> None:
        stage.model.eval()
        self.stage, self.handoff = stage, handoff
        self.held: dict[int, _Held] = {}
        self.busy = _Busy()
        self._choose = choose

    def open(self, slot: int, drawer: _Drawer | None) -> None:
        self.held[slot] = _Held(self.stage.new_cache(), drawer=drawer)

    def run(self, step: Step, inputs: torch.Tensor) -> torch.Tensor:
        """Hidden states [1, length, hidden], or on the last stage logits [kept, vocabulary]."""
        held = self.held[step.slot]
        with self.busy:
            self._choose(step.adapter)
            positions = torch.arange(held.length, held.length + step.length, device=self.stage.device)[None]
            output = self.stage.forward(
                inputs, attention_mask=None, position_ids=positions, cache=held.cache, keep=0 if step.scores else 1
            )
        held.length += step.length
        return output[0] if self.stage.cut.last else output

    def answer(self, step: Step, logits: torch.Tensor) -> torch.Tensor:
        drawer = self.held[step.slot].drawer
        assert drawer is not None
        with self.busy:
            return drawer.answer_to(step, logits, self.busy.total)


@dataclass
class _Live:
    """Rank 0's half of a sequence."""

    entry: Arrival
    slot: int
    text: Text
    shape: _Drawer  # only to know how many rows come back
    fed: int = 0
    token: int | None = None
    drawn: int = 0
    flying: bool = False
    cancelled: bool = False


class Leader:
    """Rank 0: call `run` in a thread of its own; it ends when the intake says so.

    Args:
        adapters: the number of each adapter's name; 0 is none.
        stop: the model's own end marks.
        chunk: how many tokens of a prompt go through the stages at once.
        beat, rest: told when a step was made, and when there is nothing to do.
    """

    def __init__(
        self,
        stage: Stage,
        intake: Intake,
        tokenizer: Any,
        *,
        slots: int,
        chunk: int,
        adapters: Mapping[str, int],
        stop: frozenset[int],
        choose: Callable[[int], None],
        beat: Callable[[], None] = lambda: None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._handoff = Handoff(stage.device, alone=stage.cut.whole)
        self._runner = _Runner(stage, self._handoff, choose)
        self._intake, self._tokenizer = intake, tokenizer
        self._slots, self._chunk, self._adapters, self._stop = slots, chunk, adapters, stop
        self._beat, self._rest = beat, rest
        self._waiting: deque[Arrival] = deque()
        self._live: dict[int, _Live] = {}
        self._flying: deque[tuple[_Live, Step, dist.Work | None, torch.Tensor]] = deque()
        self._window: deque[tuple[float, tuple[float, ...]]] = deque()
        self._shares = (0.0,) * self._handoff.world
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Serve until the intake ends; whatever fails is told to all who wait."""
        try:
            with torch.inference_mode():
                while not self._intake.closed:
                    self._turn()
                self._send(Step(Order.END))
                self._handoff.flush()
            self._fail("the server has stopped")
        except BaseException as error:
            self.failure = error
            self._fail(f"the engine failed: {error}")

    def _fail(self, message: str) -> None:
        entries = [*self._intake.die(), *self._waiting, *(live.entry for live in self._live.values())]
        for entry in entries:
            entry.on_event(Failed(entry.request.id, message))

    def _turn(self) -> None:
        """Whoever can step does; then the oldest step in flight is waited for."""
        if not self._live:
            self._rest()
        self._take(wait=0.0 if self._live or self._waiting else IDLE_EVERY)
        while self._waiting and len(self._live) < self._slots:
            self._open(self._waiting.popleft())
        if not self._live:
            self._send(Step(Order.IDLE))
            return
        for live in list(self._live.values()):
            if live.cancelled and not live.flying:
                self._close(live)
            elif not live.flying:
                self._advance(live)
        if self._flying:
            self._land(*self._flying.popleft())
            self._beat()

    def _take(self, *, wait: float) -> None:
        arrivals, cancelled = self._intake.collect(wait=wait)
        self._waiting.extend(arrivals)
        if cancelled:
            gone = set(cancelled)
            self._waiting = deque(entry for entry in self._waiting if entry.request.id not in gone)
            for live in self._live.values():
                live.cancelled = live.cancelled or live.entry.request.id in gone
        self._tell()

    def _open(self, entry: Arrival) -> None:
        request = entry.request
        slot = next(number for number in range(1, self._slots + 1) if number not in self._live)
        drawer = _Drawer.of(_facts(request), torch.tensor(request.prompt))
        text = Text(self._tokenizer, stop=request.sampling.stop, keep_special=request.keep_special)
        self._live[slot] = _Live(entry, slot, text, drawer)
        self._runner.open(slot, drawer if self._runner.stage.cut.last else None)
        self._send(Step(Order.OPEN, slot, prompt=len(request.prompt)))
        if self._handoff.world > 1:
            self._handoff.send_forward(_facts(request), tag=slot)
            self._handoff.send_forward(torch.tensor(request.prompt, dtype=torch.int64), tag=slot)
        if request.prompt_logprobs is not None:
            entry.on_event(Tokens(request.id, "", 0, (Scored(request.prompt[0]),)))

    def _advance(self, live: _Live) -> None:
        request = live.entry.request
        if live.fed < len(request.prompt):
            ids = list(request.prompt[live.fed : live.fed + self._chunk])
            live.fed += len(ids)
        else:
            assert live.token is not None
            ids = [live.token]
        step = Step(
            Order.STEP,
            live.slot,
            len(ids),
            draw=live.fed == len(request.prompt),
            scores=request.prompt_logprobs is not None and live.drawn == 0,
            adapter=0 if request.adapter is None else self._adapters[request.adapter],
        )
        rows = live.shape.rows(step)
        if self._handoff.world == 1:
            logits = self._runner.run(step, torch.tensor([ids], device=self._runner.stage.device))
            self._flying.append((live, step, None, self._runner.answer(step, logits)))
        else:
            self._send(step)
            work, buffer = self._handoff.await_back((rows, live.shape.width), torch.float64, tag=live.slot)
            hidden = self._runner.run(step, torch.tensor([ids], device=self._runner.stage.device))
            self._handoff.send_forward(hidden, tag=live.slot)
            live.shape.scored += rows - 1 - step.draw
            self._flying.append((live, step, work, buffer))
        live.flying = True

    def _land(self, live: _Live, step: Step, work: dist.Work | None, told: torch.Tensor) -> None:
        if work is not None:
            work.wait()
        live.flying = False
        self._count(float(told[0, 0]))
        if live.cancelled:
            self._close(live)
            return
        request = live.entry.request
        rows = told[1:].tolist()
        drawn = rows.pop() if step.draw else None
        if rows:
            top = request.prompt_logprobs or 0
            live.entry.on_event(Tokens(request.id, "", 0, tuple(_scored(row, top) for row in rows)))
        if drawn is not None:
            self._say(live, drawn)

    def _say(self, live: _Live, row: list[float]) -> None:
        request = live.entry.request
        token = int(row[0])
        live.token, live.drawn = token, live.drawn + 1
        ended = token in request.sampling.stop_token_ids or (token in self._stop and not request.sampling.ignore_eos)
        last = ended or live.drawn >= request.max_tokens
        piece = live.text.add(None if ended and not request.keep_special else token, last=last)
        scored = (_scored(row, request.sampling.logprobs),) if request.sampling.logprobs is not None else ()
        live.entry.on_event(Tokens(request.id, piece, 1, scored))
        if last or live.text.stopped:
            self._close(live)
            live.entry.on_event(Finished(request.id, "stop" if ended or live.text.stopped else "length"))

    def _close(self, live: _Live) -> None:
        del self._live[live.slot]
        del self._runner.held[live.slot]
        self._send(Step(Order.CLOSE, live.slot))
        self._tell()

    def _send(self, step: Step) -> None:
        if self._handoff.world > 1:
            self._handoff.send_forward(step.pack(), tag=HEADER_TAG)

    def _count(self, last_stage: float) -> None:
        now, own = time.perf_counter(), self._runner.busy.total
        stages = (own,) if self._handoff.world == 1 else (own, last_stage)
        self._window.append((now, stages))
        while now - self._window[0][0] > BUSY_OVER:
            self._window.popleft()
        began, before = self._window[0]
        passed = now - began
        self._shares = tuple(
            min(1.0, (after - b) / passed) if passed > 0 else 0.0 for after, b in zip(stages, before, strict=True)
        )

    def _tell(self) -> None:
        held = sum(one.length for one in self._runner.held.values())
        room = self._slots * self._intake.limits.max_model_len
        self._intake.tell(Stats(len(self._waiting), len(self._live), held / room, self._shares))


class Follower:
    """Every other rank: call `run`; it ends when rank 0 says so."""

    def __init__(
        self,
        stage: Stage,
        *,
        choose: Callable[[int], None],
        beat: Callable[[], None] = lambda: None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._handoff = Handoff(stage.device)
        self._runner = _Runner(stage, self._handoff, choose)
        self._beat, self._rest = beat, rest

    @torch.inference_mode()
    def run(self) -> None:
        """Do what the headers say, until they say END."""
        handoff, stage = self._handoff, self._runner.stage
        while True:
            step = Step.unpack(handoff.recv_forward((7,), torch.int64, device=CPU, tag=HEADER_TAG))
            if step.order is Order.END:
                handoff.flush()
                return
            if step.order is Order.OPEN:
                facts = handoff.recv_forward((FACTS,), torch.float64, device=CPU, tag=step.slot)
                prompt = handoff.recv_forward((step.prompt,), torch.int64, device=CPU, tag=step.slot)
                self._runner.open(step.slot, _Drawer.of(facts, prompt))
            elif step.order is Order.CLOSE:
                del self._runner.held[step.slot]
            elif step.order is Order.IDLE:
                self._rest()
            elif step.order is Order.STEP:
                hidden = handoff.recv_forward((1, step.length, stage.hidden_size), stage.dtype, tag=step.slot)
                told = self._runner.answer(step, self._runner.run(step, hidden))
                handoff.return_tokens(told, tag=step.slot)
                self._beat()


def _scored(row: list[float], top: int) -> Scored:
    ids, values = row[2 : 2 + top], row[2 + top : 2 + 2 * top]
    return Scored(int(row[0]), row[1], tuple((int(token), value) for token, value in zip(ids, values, strict=True)))
