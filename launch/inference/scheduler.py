"""Which sequences take which step: pure, without torch.

Sequences live in groups, as many as there are stages, and a group's sequences decode together: while one group is on the second
stage, the other is on the first. Prompts are read in chunks, and between two chunks everybody who decodes has a turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

# A shared beginning shorter than this is not worth a slot that may serve a longer one.
SHARED_AT_LEAST = 16


@dataclass(eq=False)
class Running:
    """One sequence: its prompt, what has been drawn, and how much of both is in its slot.

    Attributes:
        scored: its prompt's tokens are scored, so it is read alone and from its beginning.
        given: tokens whose computation has been ordered.
        cached: tokens that were in the slot already when it was first read.
    """

    id: str
    prompt: tuple[int, ...]
    adapter: int = 0
    scored: bool = False
    drawn: list[int] = field(default_factory=list)
    slot: int = -1
    group: int = 0
    given: int = 0
    cached: int = 0
    flying: int = 0
    gone: bool = False

    @property
    def tokens(self) -> int:
        """Length of prompt and answer so far."""
        return len(self.prompt) + len(self.drawn)

    @property
    def decodes(self) -> bool:
        """Whether all but its newest token have been ordered, and that is known."""
        return bool(self.drawn) and self.given == self.tokens - 1 and not self.flying

    def at(self, start: int, count: int) -> list[int]:
        """Its tokens from `start` on."""
        if start >= len(self.prompt):
            return self.drawn[start - len(self.prompt) : start - len(self.prompt) + count]
        return (
            [*self.prompt, *self.drawn][start : start + count]
            if self.drawn
            else list(self.prompt[start : start + count])
        )


@dataclass(frozen=True)
class Part:
    """One row of a step: `count` tokens from `start` on; `draws` says whether a token is drawn after them."""

    running: Running
    start: int
    count: int
    draws: bool


@dataclass(frozen=True)
class Opening:
    """A sequence enters a slot: its first `shared` tokens are there already, or in the slot `source`."""

    running: Running
    source: int
    shared: int


@dataclass(frozen=True)
class Step:
    """What goes through the stages at once."""

    group: int
    parts: tuple[Part, ...]
    openings: tuple[Opening, ...] = ()


class Scheduler:
    """First come, first served.

    Args:
        slots: how many sequences run at once.
        groups: how many steps are in flight at once.
        budget: tokens of one step.
        room: tokens that all slots may hold together; past it whoever came last is put aside and computed anew later.
        shares: whether a slot may begin as another one does (no windows, no states).
        packs: whether prompts of different lengths may be read together (no states).
    """

    def __init__(
        self, slots: int, *, groups: int, budget: int, room: int, shares: bool = True, packs: bool = True
    ) -> None:
        self.slots, self.groups, self.budget, self.room = slots, groups, budget, room
        self.shares, self.packs = shares, packs
        self.waiting: deque[Running] = deque()
        self.active: list[Running] = []  # in their order of arrival
        self.preempted = 0
        self.in_flight = 0
        self._free = list(range(slots))
        self._left: dict[int, tuple[int, tuple[int, ...]]] = {}  # what free slots still hold: adapter and tokens
        self._openings: list[Opening] = []
        self._turn = 0
        self._owed: set[int] = set()  # the groups that have had no turn since the last chunk
        self._chunked: Running | None = None

    def add(self, running: Running) -> None:
        """One more sequence waits."""
        self.waiting.append(running)

    def remove(self, running: Running) -> None:
        """A sequence has ended or was given up; its slot is free at once: steps reach the stages in their order."""
        running.gone = True
        if running in self.active:
            self.active.remove(running)
            self._release(running)
        elif running in self.waiting:
            self.waiting.remove(running)

    @property
    def held(self) -> int:
        """Tokens in all slots."""
        return sum(running.given for running in self.active)

    def next(self) -> Step | None:
        """The next step, or None where one that is in flight must land first."""
        if self.in_flight >= self.groups:
            return None
        self._admit()
        if parts := self._decode(self._owed):
            return self._order(parts, read=False)
        if parts := self._read():
            return self._order(parts, read=True)
        if parts := self._decode(range(self.groups)):
            return self._order(parts, read=False)
        return None

    def landed(self, step: Step, tokens: Iterable[int]) -> list[tuple[Running, int]]:
        """A step has come back with a token for each part that draws; returns those of sequences that are still here."""
        self.in_flight -= 1
        drawn = iter(tokens)
        told = []
        for part in step.parts:
            part.running.flying -= 1
            if part.draws:
                token = next(drawn)
                if not part.running.gone:
                    part.running.drawn.append(token)
                    told.append((part.running, token))
        return told

    # ---- who comes in

    def _admit(self) -> None:
        while self.waiting and self._free:
            running = self.waiting[0]
            if self.active and sum(one.tokens for one in self.active) + running.tokens > self.room:
                return
            self.waiting.popleft()
            running.group = min(range(self.groups), key=lambda group: (self._size(group), group))
            opening = self._opening(running)
            self._free.remove(running.slot)
            self._left.pop(running.slot, None)
            running.given = opening.shared
            running.cached = running.cached or opening.shared
            self.active.append(running)
            self._openings.append(opening)

    def _opening(self, running: Running) -> Opening:
        source, shared = self._longest_beginning(running)
        if source in self._free:
            running.slot = source
            return Opening(running, source, shared)
        share = -(-self.slots // self.groups)
        own = [slot for slot in self._free if slot // share == running.group] or self._free
        # A slot that holds nothing goes first: what others hold may still be of use.
        running.slot = min(own, key=lambda slot: (slot in self._left, slot))
        return Opening(running, source if shared else running.slot, shared)

    def _longest_beginning(self, running: Running) -> tuple[int, int]:
        best = (-1, 0)
        if not self.shares or running.scored:
            return best
        held = {slot: tokens for slot, (adapter, tokens) in self._left.items() if adapter == running.adapter}
        here = {one.slot: tuple(one.at(0, one.given)) for one in self.active if one.adapter == running.adapter}
        wanted = running.prompt[: running.tokens - 1]
        for slot, tokens in (held | here).items():
            length = _common(tokens, wanted)
            if length >= SHARED_AT_LEAST and length > best[1]:
                best = (slot, length)
        return best

    def _release(self, running: Running) -> None:
        self._free.append(running.slot)
        self._free.sort()
        if not any(opening.running is running for opening in self._openings):  # else nothing of it has reached the slot
            self._left[running.slot] = (running.adapter, tuple(running.at(0, running.given)))
        self._openings = [opening for opening in self._openings if opening.running is not running]

    # ---- who takes a step

    def _read(self) -> list[Part]:
        """The oldest prompts that have not been read, as many of their tokens as one step may have.

        After a chunk of a long one others have a turn, if there are any.
        """
        parts: list[Part] = []
        width = 0
        for running in sorted(self.active, key=lambda running: running is self._chunked):
            left = running.tokens - running.given
            if running.decodes or left <= 0 or (running.drawn and left == 1 and running.flying):
                continue
            if parts and (running.scored or parts[0].running.scored or not self.packs):
                break
            count = min(left, self.budget)
            # Rows are filled up to the longest: a short prompt beside a long one would cost as much.
            widest = max(width, count)
            if parts and (widest * (len(parts) + 1) > self.budget or count < left or widest > 2 * min(width, count)):
                continue
            width = widest
            parts.append(Part(running, running.given, count, draws=count == left))
            if count < left:
                break
        if parts:
            last = parts[-1]
            self._chunked = None if last.draws else last.running
        return parts

    def _decode(self, groups: Collection[int]) -> list[Part]:
        for group in range(self.groups):
            self._even_out(group)
        for offset in range(self.groups):
            group = (self._turn + offset) % self.groups
            if group not in groups:
                continue
            ready = [running for running in self.active if running.group == group and running.decodes]
            while ready and sum(running.tokens for running in self.active) > self.room and len(self.active) > 1:
                self._put_aside(ready)
            if ready:
                self._turn = (group + 1) % self.groups
                ready = sorted(ready[: self.budget], key=lambda running: running.slot)
                return [Part(running, running.given, 1, draws=True) for running in ready]
        return []

    def _even_out(self, group: int) -> None:
        """Move sequences that are not in flight over from the largest group."""
        largest = max(range(self.groups), key=self._size)
        movable = [running for running in self.active if running.group == largest and not running.flying]
        while movable and self._size(largest) > self._size(group) + 1:
            movable.pop().group = group

    def _put_aside(self, ready: list[Running]) -> None:
        last = next(running for running in reversed(self.active) if running.drawn or not running.scored)
        if last.flying:  # it can be put aside once its step has landed
            ready.clear()
            return
        self.active.remove(last)
        self._release(last)
        last.given, last.slot = 0, -1
        self.waiting.appendleft(last)
        self.preempted += 1
        if last in ready:
            ready.remove(last)

    def _order(self, parts: Sequence[Part], *, read: bool) -> Step:
        group = parts[0].running.group
        self._owed = set(range(self.groups)) if read else self._owed - {group}
        self.in_flight += 1
        for part in parts:
            part.running.given += part.count
            part.running.flying += 1
        openings, self._openings = tuple(self._openings), []
        return Step(group, tuple(parts), openings)

    def _size(self, group: int) -> int:
        return sum(running.group == group for running in self.active)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low
