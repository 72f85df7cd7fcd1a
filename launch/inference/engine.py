"""Generation over the stages, for all requests of an intake at once.

Rank 0 leads: it decides who takes the next step, runs its own layers and sends a header and the hidden states on. The other rank
follows what the headers say; it draws the tokens and returns only their ids, and scores where they were asked for. As many steps
are in flight as there are stages, so that both compute at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from launch.inference import wire
from launch.inference.intake import Arrival, Failed, Finished, Intake, Scored, Stats, Tokens
from launch.inference.link import Link
from launch.inference.meter import Meter
from launch.inference.runner import Chooser, Runner
from launch.inference.scheduler import Opening, Part, Running, Scheduler, Step
from launch.inference.text import Text
from launch.inference.wire import Order, Told, WireOpening, WireRow, WireStep
from launch.shard.stage import Stage

# Seconds between two headers of an idle server: no receive may wait so long that the process group gives up.
IDLE_EVERY = 5.0


@dataclass
class Answer:
    """Rank 0's half of a sequence: whom to tell, and its text so far."""

    arrival: Arrival
    running: Running
    text: Text

    @property
    def tops(self) -> tuple[int, int]:
        """How many likeliest tokens are told with each of the answer's and of the prompt's; -1 where no scores are."""
        request = self.arrival.request
        answer, prompt = (-1 if top is None else top for top in (request.sampling.logprobs, request.prompt_logprobs))
        return answer, prompt


@dataclass
class _Flight:
    """A step that the stages work on."""

    step: Step
    wire: WireStep
    tops: list[tuple[int, int]]
    work: dist.Work | None
    reply: torch.Tensor


class Leader:
    """Rank 0: call `run` in a thread of its own; it ends when the intake says so.

    Args:
        slots: how many sequences run at once.
        chunk: how many tokens one step has at most.
        room: how many tokens all slots may hold together, where that is less than they could.
        adapters: the number of each adapter's name, and who has a row computed with it.
        stop: the model's own end marks.
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
        stop: frozenset[int],
        room: int | None = None,
        adapters: Mapping[str, int] | None = None,
        chooser: Chooser | None = None,
        beat: Callable[[], None] = lambda: None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._stage, self._intake, self._tokenizer = stage, intake, tokenizer
        self._link = Link(stage)
        self._runner = Runner(stage, slots=slots, longest=intake.limits.max_model_len, adapters=chooser)
        self._scheduler = Scheduler(
            slots,
            groups=self._link.world,
            budget=chunk,
            room=room or slots * intake.limits.max_model_len,
            shares=self._runner.shares,
            packs=self._runner.packs,
        )
        self._adapters, self._stop = dict(adapters or {}), stop
        self._beat, self._rest = beat, rest
        self._answers: dict[int, Answer] = {}
        self._flights: deque[_Flight] = deque()
        self._meter = Meter(self._link.world)
        self._busy = (0.0,) * self._link.world
        self._prompt_tokens = self._generated_tokens = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Serve until the intake ends; whatever fails is told to all who wait."""
        try:
            with torch.inference_mode():
                while not self._intake.closed:
                    self._turn()
                while self._flights:
                    self._land(self._flights.popleft())
                self._link.signal(Order.END)
                self._link.flush()
            self._fail("the server has stopped")
        except BaseException as error:
            self.failure = error
            self._fail(f"the engine failed: {error}")

    def _fail(self, message: str) -> None:
        for arrival in [*(answer.arrival for answer in self._answers.values()), *self._intake.die()]:
            arrival.on_event(Failed(arrival.request.id, message))

    def _turn(self) -> None:
        """Whoever can step does; then the oldest step in flight is waited for."""
        idle = not self._answers and not self._flights
        if idle:
            self._rest()
        arrivals, cancelled = self._intake.collect(wait=IDLE_EVERY if idle else 0.0)
        for arrival in arrivals:
            self._take(arrival)
        if cancelled:
            given_up = set(cancelled)
            for answer in [one for one in self._answers.values() if one.running.id in given_up]:
                self._close(answer)
        while (step := self._scheduler.next()) is not None:
            self._launch(step)
        if self._flights:
            self._land(self._flights.popleft())
            self._beat()
        elif not self._answers:
            self._link.signal(Order.IDLE)
        self._tell()

    def _take(self, arrival: Arrival) -> None:
        request = arrival.request
        running = Running(
            request.id,
            request.prompt,
            adapter=0 if request.adapter is None else self._adapters[request.adapter],
            scored=request.prompt_logprobs is not None,
        )
        self._prompt_tokens += len(request.prompt)
        text = Text(self._tokenizer, stop=request.sampling.stop, keep_special=request.keep_special)
        self._answers[id(running)] = Answer(arrival, running, text)
        self._scheduler.add(running)
        if request.prompt_logprobs is not None:
            arrival.on_event(Tokens(request.id, "", 0, (Scored(request.prompt[0]),)))

    # ---- a step

    def _launch(self, step: Step) -> None:
        answers = [self._answers[id(part.running)] for part in step.parts]
        tops = [answer.tops for answer in answers]
        sent = WireStep(
            step.group,
            tuple(_row(part) for part in step.parts),
            tuple(self._opening(opening) for opening in step.openings),
            0 if any(part.running.scored and not part.running.drawn for part in step.parts) else 1,
        )
        ids = _ids(step, sent.length)
        if self._link.world == 1:
            self._flights.append(_Flight(step, sent, tops, None, self._runner.run(sent, ids.to(self._stage.device))))
            return
        self._link.announce(sent)
        work, buffer = self._link.await_reply(wire.reply_size(sent, tops))
        self._link.hand_on(self._runner.run(sent, ids.to(self._stage.device)))
        self._flights.append(_Flight(step, sent, tops, work, buffer))

    def _opening(self, opening: Opening) -> WireOpening:
        running = opening.running
        request = self._answers[id(running)].arrival.request
        return WireOpening.of(request, running.slot, opening.source, opening.shared, running.drawn)

    def _land(self, flight: _Flight) -> None:
        if flight.work is not None:
            flight.work.wait()
        reply = wire.read_reply(flight.reply, flight.wire, flight.tops)
        stages = (reply.busy,) if self._link.world == 1 else (self._runner.busy, reply.busy)
        self._busy = self._meter.shares(stages)
        drawn = [told for _, told in reply.rows if told is not None]
        for part, (scored, _), (_, top) in zip(flight.step.parts, reply.rows, flight.tops, strict=True):
            if scored and not part.running.gone:
                arrival = self._answers[id(part.running)].arrival
                arrival.on_event(Tokens(arrival.request.id, "", 0, tuple(_scored(one, top) for one in scored)))
        parts = [part for part in flight.step.parts if part.draws]
        gone = [part.running.gone for part in parts]
        self._scheduler.landed(flight.step, [told.token for told in drawn])
        for part, told, left in zip(parts, drawn, gone, strict=True):
            if not left:
                self._say(self._answers[id(part.running)], told)

    def _say(self, answer: Answer, told: Told) -> None:
        request, running = answer.arrival.request, answer.running
        rule = request.sampling
        if request.max_tokens < 1:  # only the prompt's scores were asked for
            self._end(answer, "length")
            return
        ended = told.token in rule.stop_token_ids or (told.token in self._stop and not rule.ignore_eos)
        last = ended or len(running.drawn) >= request.max_tokens
        piece = answer.text.add(None if ended and not request.keep_special else told.token, last=last)
        scored = (_scored(told, answer.tops[0]),) if rule.logprobs is not None else ()
        self._generated_tokens += 1
        cached = running.cached if len(running.drawn) == 1 else 0
        answer.arrival.on_event(Tokens(request.id, piece, 1, scored, (told.token,), cached))
        if last or answer.text.stopped:
            self._end(answer, "stop" if ended or answer.text.stopped else "length")

    def _end(self, answer: Answer, reason: str) -> None:
        self._close(answer)
        answer.arrival.on_event(Finished(answer.arrival.request.id, reason))

    def _close(self, answer: Answer) -> None:
        self._scheduler.remove(answer.running)
        del self._answers[id(answer.running)]

    def _tell(self) -> None:
        scheduler = self._scheduler
        self._intake.tell(
            Stats(
                waiting=len(scheduler.waiting),
                running=len(scheduler.active),
                kv_use=scheduler.held / scheduler.room,
                busy=self._busy,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                preempted=scheduler.preempted,
            )
        )


class Follower:
    """Every other rank: call `run`; it ends when rank 0 says so."""

    def __init__(
        self,
        stage: Stage,
        *,
        slots: int,
        longest: int,
        chooser: Chooser | None = None,
        beat: Callable[[], None] = lambda: None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._link = Link(stage)
        self._runner = Runner(stage, slots=slots, longest=longest, adapters=chooser)
        self._beat, self._rest = beat, rest

    @torch.inference_mode()
    def run(self) -> None:
        """Do what the headers say, until they say END."""
        while True:
            order, step = self._link.next()
            if order == Order.END:
                self._link.flush()
                return
            if step is not None:
                self._link.reply(self._runner.run(step, self._link.hidden(step)))
                self._beat()
            elif order == Order.IDLE:
                self._rest()


def _ids(step: Step, length: int) -> torch.Tensor:
    """[rows, length], each row's tokens at its end."""
    rows = [[0] * (length - part.count) + part.running.at(part.start, part.count) for part in step.parts]
    return torch.tensor(rows, dtype=torch.int64)


def _row(part: Part) -> WireRow:
    running = part.running
    scores = 0
    if running.scored and not running.drawn:
        scores = min(part.count, len(running.prompt) - 1 - part.start)
    return WireRow(running.slot, part.start, part.count, part.draws, running.adapter, scores)


def _scored(told: Told, top: int) -> Scored:
    return Scored(told.token, told.logprob, told.top[: max(top, 0)])
