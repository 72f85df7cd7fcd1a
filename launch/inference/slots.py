"""What a stage keeps of the sequences that it works on: one slot each, of one fixed size, in every layer's own way.

A layer that sees everything keeps a column for each position, one that sees a window a ring of them, one with a state that state.
The last column of each is a bin: positions that stand for padding are written there, and nobody reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from cluster.errors import WrongInputError
from launch.shard.stage import Stage


@dataclass(frozen=True)
class Place:
    """Where the tokens of one step belong: the slots of its rows, and their positions.

    Attributes:
        slots: [rows].
        positions: [rows, tokens], -1 where a token is padding, which stands before the others.
        longest: how many positions the longest row has after the step.
        run: the slots as a slice where they follow one another, so that nothing needs to be gathered.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    longest: int
    run: slice | None

    @classmethod
    def of(cls, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Place:
        """The place of rows that have `starts` tokens already and get `counts` more."""
        width = max(counts)
        positions = [
            [-1] * (width - count) + list(range(start, start + count))
            for start, count in zip(starts, counts, strict=True)
        ]
        follows = all(b == a + 1 for a, b in pairwise(slots))
        run = slice(slots[0], slots[-1] + 1) if follows else None
        longest = max(row[-1] for row in positions) + 1
        return cls(torch.tensor(list(slots), device=device), torch.tensor(positions, device=device), longest, run)

    def rows(self, kept: torch.Tensor) -> torch.Tensor:
        """The rows of this step out of [slots, ...]."""
        return kept[self.run] if self.run is not None else kept.index_select(0, self.slots)


class _Kept(DynamicLayer):  # type: ignore[misc]  # it has no types
    """Keys and values of all slots; subclasses say where a position's column is, and what is seen of it."""

    is_sliding = False

    def __init__(self, slots: int, columns: int) -> None:
        super().__init__()
        self._slots, self._columns = slots, columns
        self.place: Place | None = None
        self.kept_keys = self.kept_values = torch.empty(0)

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(self._slots, states.shape[1], self._columns + 1, states.shape[3])

    def _write(self, columns: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert self.place is not None
        rows = self.place.slots[:, None]
        self.kept_keys[rows, :, columns] = keys.transpose(1, 2)
        self.kept_values[rows, :, columns] = values.transpose(1, 2)

    def _ready(self, keys: torch.Tensor, values: torch.Tensor) -> Place:
        if not self.kept_keys.numel():
            self.kept_keys, self.kept_values = self._allocate(keys), self._allocate(values)
        assert self.place is not None
        return self.place

    def get_seq_length(self) -> int:
        """Unused: masks and positions are given."""
        return 0


class EverySlot(_Kept):
    """A layer that sees every position."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the new keys and values [rows, heads, tokens, size]; returns all of these rows, as `full_mask` has them."""
        place = self._ready(key_states, value_states)
        bin_column = self._columns
        self._write(torch.where(place.positions < 0, bin_column, place.positions), key_states, value_states)
        return (
            place.rows(self.kept_keys[:, :, : place.longest]),
            place.rows(self.kept_values[:, :, : place.longest]),
        )

    def copy(self, source: int, to: int, length: int) -> None:
        """The first `length` positions of one slot into another."""
        if self.kept_keys.numel():
            self.kept_keys[to, :, :length] = self.kept_keys[source, :, :length]
            self.kept_values[to, :, :length] = self.kept_values[source, :, :length]


class WindowSlots(_Kept):
    """A layer that sees a window: the column of position p is p modulo the window."""

    is_sliding = True

    def __init__(self, slots: int, columns: int, window: int) -> None:
        super().__init__(slots, min(columns, window))
        self.window = window

    @property
    def columns(self) -> int:
        """How many positions are kept."""
        return self._columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `EverySlot.update`, in the order of `window_mask`."""
        place = self._ready(key_states, value_states)
        positions, size = place.positions, self._columns
        lost = (positions < 0) | (positions <= positions[:, -1:] - size)
        columns = torch.where(lost, size, positions % size)
        if positions.shape[1] == 1:
            self._write(columns, key_states, value_states)
            return place.rows(self.kept_keys[:, :, :size]), place.rows(self.kept_values[:, :, :size])
        keys = torch.cat([place.rows(self.kept_keys[:, :, :size]), key_states], dim=2)
        values = torch.cat([place.rows(self.kept_values[:, :, :size]), value_states], dim=2)
        self._write(columns, key_states, value_states)
        return keys, values


class StateSlots:
    """A layer with a state instead of keys: the states of all slots, lent to a layer of transformers' for a step."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._conv = self._recurrent = torch.empty(0)

    def lend(self, place: Place) -> LinearAttentionLayer:
        """The rows' states. Rows that begin must not be lent together with others."""
        lent: Any = LinearAttentionLayer()
        if int(place.positions.min()) > 0 and self._conv.numel():
            lent.update_conv_state(place.rows(self._conv).clone())
            if self._recurrent.numel():
                lent.update_recurrent_state(place.rows(self._recurrent).clone())
        return lent

    def take_back(self, lent: Any, place: Place) -> None:
        """What the step made of them."""
        for name, states in (("_conv", lent.conv_states[0]), ("_recurrent", lent.recurrent_states[0])):
            if states is not None:
                if not getattr(self, name).numel():
                    setattr(self, name, states.new_zeros(self._slots, *states.shape[1:]))
                getattr(self, name)[place.slots] = states


class Slots:
    """All layers of one stage.

    Raises:
        WrongInputError: a layer keeps something else.
    """

    def __init__(self, stage: Stage, slots: int, longest: int) -> None:
        template = stage.new_cache()
        self._states: dict[int, StateSlots] = {}
        self._kept: list[_Kept] = []
        layers: list[Any] = []
        for index, layer in enumerate(template.layers):
            layers.append(DummyLayer())
            if not stage.cut.start <= index < stage.cut.end:
                continue
            if type(layer) is DynamicLayer:
                layers[-1] = EverySlot(slots, longest)
            elif type(layer) is DynamicSlidingWindowLayer:
                layers[-1] = WindowSlots(slots, longest, int(layer.sliding_window))
            elif type(layer) is LinearAttentionLayer:
                self._states[index] = StateSlots(slots)
            else:
                raise WrongInputError(
                    f"{type(stage.model).__name__}: keeps {type(layer).__name__} of earlier tokens, which cannot be served yet",
                    "choose another model",
                )
            if isinstance(layers[-1], _Kept):
                self._kept.append(layers[-1])
        self._layers = layers
        self.windows = [layer for layer in self._kept if isinstance(layer, WindowSlots)]
        self.has_states = bool(self._states)

    def enter(self, place: Place) -> Cache:
        """The cache that one step runs with; call `leave` after it."""
        for layer in self._kept:
            layer.place = place
        for index, state in self._states.items():
            self._layers[index] = state.lend(place)
        cache = Cache(layers=self._layers)
        self._cache = cache
        return cache

    def leave(self, place: Place) -> None:
        """Keep the states that the step has made."""
        for index, state in self._states.items():
            state.take_back(self._cache.layers[index], place)

    def copy(self, source: int, to: int, length: int) -> None:
        """Let slot `to` begin as `source` does; only where `can_share`."""
        for layer in self._kept:
            assert isinstance(layer, EverySlot)
            layer.copy(source, to, length)


def full_mask(place: Place, dtype: torch.dtype) -> torch.Tensor:
    """[rows, 1, tokens, longest], added to scores: 0 where a token sees a position, else the type's lowest number."""
    columns = torch.arange(place.longest, device=place.positions.device)
    return _added(columns > place.positions[:, :, None], dtype)


def window_mask(place: Place, layer: WindowSlots, dtype: torch.dtype, *, in_chunks: bool = False) -> torch.Tensor:
    """As `full_mask`, [rows, 1, tokens, columns of the ring, and with more than one token those tokens].

    With `in_chunks` windows do not slide: who is in one chunk of the sequence sees what came before in it (Llama 4's layers with
    rotary positions).
    """
    queries, size = place.positions[:, :, None], layer.columns
    columns = torch.arange(size, device=queries.device)
    single = queries.shape[1] == 1
    last = place.positions if single else _starts(place.positions)[:, None] - 1
    kept, own = (last - (last - columns) % size)[:, None, :], place.positions[:, None, :]
    if not single:
        kept = torch.cat([kept, own], dim=2)
    first = queries - queries % layer.window if in_chunks else queries - layer.window + 1
    seen = (kept >= 0) & (kept >= first) & (kept <= queries)
    return _added(~seen, dtype)


def _starts(positions: torch.Tensor) -> torch.Tensor:
    """The first position of each row that is no padding, [rows]."""
    return positions.where(positions >= 0, torch.iinfo(positions.dtype).max).amin(dim=1)


def _added(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
