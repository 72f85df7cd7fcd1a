"""Who takes which step: pure, so every rule is tried without a model."""

from __future__ import annotations

import random
import time
from itertools import pairwise

from launch.inference.scheduler import Running, Scheduler, Step


def scheduler(slots: int = 8, budget: int = 16, room: int = 10_000, groups: int = 2, **how: bool) -> Scheduler:
    return Scheduler(slots, groups=groups, budget=budget, room=room, **how)


def sequence(name: str, length: int, first: int = 0) -> Running:
    return Running(name, tuple(range(first, first + length)))


def land(made: Scheduler, step: Step) -> None:
    made.landed(step, [7] * sum(part.draws for part in step.parts))


def until_decoding(made: Scheduler, *names: str) -> None:
    """Step on until all of them have their first token and nothing is in flight."""
    flights: list[Step] = []
    wanted = {one.id for one in [*made.waiting, *made.active] if one.id in names}
    for _ in range(200):
        while (step := made.next()) is not None:
            flights.append(step)
        land(made, flights.pop(0))
        if wanted <= {one.id for one in made.active if one.drawn}:
            break
    while flights:
        land(made, flights.pop(0))


def test_a_long_prompt_is_read_in_chunks_and_decoding_has_a_turn_after_each() -> None:
    made = scheduler()
    made.add(sequence("short", 4))
    until_decoding(made, "short")
    made.add(sequence("long", 160, first=500))
    steps = []
    for _ in range(12):
        step = made.next()
        assert step is not None
        steps.append([part.running.id for part in step.parts])
        assert sum(part.count for part in step.parts) <= 16
        land(made, step)
    assert all(a != b for a, b in pairwise(steps)), steps


def test_nobody_who_decodes_waits_for_more_than_one_chunk_between_two_tokens() -> None:
    made = scheduler()
    names = ["one", "two", "three"]  # in both groups
    for number, name in enumerate(names):
        made.add(sequence(name, 4, first=1000 * number))
    until_decoding(made, *names)
    made.add(sequence("long", 320, first=500))
    chunks_since = dict.fromkeys(names, 0)
    flights: list[Step] = []
    chunks = 0
    while chunks < 20:
        while (step := made.next()) is not None:
            flights.append(step)
            for part in step.parts:
                if part.running.id == "long":
                    chunks += 1
                    chunks_since = {name: count + 1 for name, count in chunks_since.items()}
                else:
                    chunks_since[part.running.id] = 0
            assert max(chunks_since.values()) <= 1, chunks_since
        assert len(flights) == 2, "both stages have work"
        land(made, flights.pop(0))


def test_a_short_prompt_has_its_turn_after_one_chunk_of_a_long_one() -> None:
    made = scheduler()
    made.add(sequence("long", 160, first=500))
    first = made.next()
    made.add(sequence("short", 4))
    second = made.next()
    assert first is not None
    assert second is not None
    assert [part.running.id for part in second.parts] == ["short"]


def test_two_groups_are_kept_even_as_sequences_leave() -> None:
    made = scheduler()
    for number in range(8):
        made.add(sequence(str(number), 3, first=100 * number))
    until_decoding(made, *map(str, range(8)))
    for running in [one for one in made.active if one.group == 0]:
        made.remove(running)
    first, second = made.next(), made.next()
    assert first is not None
    assert second is not None
    assert [len(first.parts), len(second.parts)] == [2, 2]
    assert {first.group, second.group} == {0, 1}
    assert made.next() is None, "both stages have work"


def test_no_slot_is_given_twice_and_one_that_is_left_is_given_again_in_order_of_arrival() -> None:
    made = scheduler(slots=2)
    for number in range(4):
        made.add(sequence(str(number), 3, first=100 * number))
    step = made.next()
    assert step is not None
    assert [one.id for one in made.active] == ["0", "1"]
    made.remove(made.active[0])
    land(made, step)
    made.next()
    assert [one.id for one in made.active] == ["1", "2"]
    assert len({one.slot for one in made.active}) == 2


def test_what_was_drawn_for_a_sequence_that_was_given_up_in_flight_is_dropped() -> None:
    made = scheduler()
    gone = sequence("gone", 3)
    made.add(gone)
    step = made.next()
    assert step is not None
    made.remove(gone)
    assert made.landed(step, [5]) == []
    assert gone.drawn == []


def test_a_prompt_that_begins_as_a_slot_does_is_read_from_there_on() -> None:
    made = scheduler(budget=64)
    made.add(sequence("first", 40))
    until_decoding(made, "first")
    made.add(sequence("second", 45))
    made.next()
    step = made.next()
    assert step is not None
    part = next(part for part in step.parts if part.running.id == "second")
    assert (part.start, part.count) == (40, 5)
    assert part.running.cached == 40


def test_another_adapter_shares_nothing() -> None:
    made = scheduler(budget=64)
    made.add(sequence("first", 40))
    until_decoding(made, "first")
    other = sequence("second", 45)
    other.adapter = 1
    made.add(other)
    made.next()
    assert other.cached == 0


def test_who_came_last_is_put_aside_when_room_runs_out_and_goes_on_later() -> None:
    made = scheduler(room=40, budget=64)
    first, last = sequence("first", 18), sequence("last", 18, first=100)
    made.add(first)
    made.add(last)
    until_decoding(made, "first", "last")
    flights: list[Step] = []
    while made.preempted == 0:
        while (step := made.next()) is not None:
            flights.append(step)
        land(made, flights.pop(0))
    assert list(made.waiting) == [last]
    drawn = list(last.drawn)
    while flights:
        land(made, flights.pop(0))
    made.remove(first)
    until_decoding(made, "last")
    assert last.drawn[: len(drawn)] == drawn
    assert last.given >= 18


def test_everything_that_is_asked_ends_whatever_comes_and_goes() -> None:
    draw = random.Random(11)  # noqa: S311 - reproducible, not secret
    made = scheduler(slots=5, room=300)
    goals = {str(number): draw.randrange(1, 30) for number in range(80)}
    waiting = [sequence(name, draw.randrange(1, 90), first=draw.randrange(3) * 1000) for name in goals]
    flights: list[Step] = []
    done: set[str] = set()
    for _ in range(20_000):
        if waiting and draw.random() < 0.3:
            made.add(waiting.pop())
        while (step := made.next()) is not None:
            assert len({id(part.running) for part in step.parts}) == len(step.parts)
            flights.append(step)
        if flights:
            land(made, flights.pop(0))
        for running in list(made.active):
            if len(running.drawn) >= goals[running.id] or draw.random() < 0.002:
                made.remove(running)
                done.add(running.id)
        if len(done) == len(goals):
            break
    assert done == goals.keys()
    assert made.held == 0


def test_a_step_of_32_sequences_is_chosen_in_far_less_than_a_millisecond() -> None:
    made = scheduler(slots=32, budget=2048)
    for number in range(32):
        made.add(sequence(str(number), 20, first=100 * number))
    until_decoding(made, *map(str, range(32)))
    began = time.process_time()
    for _ in range(500):
        step = made.next()
        assert step is not None
        land(made, step)
    assert (time.process_time() - began) / 500 < 1e-3
