"""What would still fit, or would make it fit, and what a plan takes for granted. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.box import GIB, Box
from launch.model_card import ModelCard
from launch.precision import Precision
from launch.recipe import FinetuneRecipe, InferenceRecipe
from launch.workload import Serving, Workload

Planned = FinetuneRecipe | InferenceRecipe
_LENGTHS = ("max_model_len", "sequence_len")
_STEP = 64  # lengths are told in multiples of this
_LONGEST = 2**20  # for models whose positions are not bounded
_MOST = 4096  # nobody serves, or learns from, more at once


@dataclass(frozen=True)
class Change:
    """A value for a key of the recipe."""

    key: str
    value: int | bool | str

    @property
    def text(self) -> str:
        """As the recipe would have it."""
        value = str(self.value).lower() if isinstance(self.value, bool) else f"{self.value}"
        return f"{self.key}: {value}"


@dataclass(frozen=True)
class Way:
    """Changes that are made together."""

    changes: tuple[Change, ...]

    @property
    def text(self) -> str:
        """In one line."""
        return " with ".join(f"`{change.text}`" for change in self.changes)


def room(recipe: Planned, card: ModelCard, would_fit: Callable[[Planned], bool]) -> tuple[Way, ...]:
    """The longest context, and the most sequences, that would fit too, each with everything else as it is."""
    sizes = ("max_model_len", "max_num_seqs")
    if isinstance(recipe, FinetuneRecipe):
        sizes = ("sequence_len", "micro_batch_size")
    found = []
    for key in sizes:
        now = getattr(recipe, key)
        most = (card.max_positions or _LONGEST) if key in _LENGTHS else _MOST
        value = _largest(recipe, key, would_fit, low=now, high=most)
        found.append(Way((Change(key, max(now, value)),)))
    return tuple(found)


def ways_out(recipe: Planned, would_fit: Callable[[Planned], bool]) -> tuple[Way, ...]:
    """What would make it fit: one switch (quantise, keep less), or one smaller number; else both together; else nothing."""
    switches = _switches(recipe)
    ways = [Way((switch,)) for switch in switches if would_fit(_changed(recipe, switch))]
    ways += [Way((change,)) for change in _smaller(recipe, would_fit)]
    if not ways and switches:
        changed = recipe
        for switch in switches:  # the last word on a key counts: it is the one that saves most
            changed = _changed(changed, switch)
        kept = tuple({switch.key: switch for switch in switches}.values())
        if would_fit(changed):
            return (Way(kept),)
        ways = [Way((*kept, change)) for change in _smaller(changed, would_fit)]
    return tuple(ways)


def _smaller(recipe: Planned, would_fit: Callable[[Planned], bool]) -> list[Change]:
    sizes = ["max_model_len", "max_num_seqs"]
    if isinstance(recipe, FinetuneRecipe):
        sizes = ["sequence_len", "micro_batch_size", *(["lora_r"] if recipe.adapter != "full" else [])]
    found = [Change(key, _largest(recipe, key, would_fit, low=0, high=getattr(recipe, key) - 1)) for key in sizes]
    return [change for change in found if change.value]


def _switches(recipe: Planned) -> list[Change]:
    if isinstance(recipe, InferenceRecipe):
        return [Change("quantization", "nf4")] if recipe.quantization is None else []
    changes = []
    if not recipe.gradient_checkpointing:
        changes.append(Change("gradient_checkpointing", True))
    if recipe.adapter == "full":
        changes.append(Change("adapter", "lora"))
    if recipe.adapter != "qlora":
        changes.append(Change("adapter", "qlora"))
    return changes


def _changed(recipe: Planned, change: Change) -> Planned:
    return recipe.model_copy(update={change.key: change.value})


def _largest(recipe: Planned, key: str, would_fit: Callable[[Planned], bool], *, low: int, high: int) -> int:
    """The largest value of `key` above `low`, up to `high`, that fits; `low` where there is none. Lengths in steps of _STEP."""
    step = _STEP if key in _LENGTHS else 1
    steps = range(low // step + 1, high // step + 1)
    fitting = bisect_right(steps, 0, key=lambda count: not would_fit(_changed(recipe, Change(key, count * step))))
    return steps[fitting - 1] * step if fitting else low


def assumptions(card: ModelCard, work: Workload, precision: Precision, boxes: Sequence[Box]) -> tuple[str, ...]:
    """What the plan takes for granted, each in a line."""
    lines = [_about(box, boxes) for box in {(box.about, box.total): box for box in boxes}.values()]
    if not card.has_weights:
        lines.append("sizes: from config.json, the weights are not there")
    lines.append(f"weights: {_held(card, precision)}")
    if speeds := boxes[0].speeds:
        evenly = ", tokens spread evenly over the experts" if card.experts else ""
        filled = "caches half full" if isinstance(work, Serving) else "every sample sequence_len tokens long"
        lines += [f"speeds: {filled}{evenly}", *speeds.sources]
    return tuple(lines)


def _about(box: Box, boxes: Sequence[Box]) -> str:
    same = [other.node for other in boxes if (other.about, other.total) == (box.about, box.total)]
    who = (
        "each node" if len(same) == len(boxes) > 1 and box.ranks == 1 else box.node if box.ranks == 1 else "both ranks"
    )
    kept = f"{box.reserve / GIB:.3g} GiB"
    shared = f", shared by {box.ranks} ranks" if box.ranks > 1 else ""
    return f"{who}: {box.about}, {box.total / GIB:.1f} GiB less {kept} for the system and {kept} of guard{shared}"


def _held(card: ModelCard, precision: Precision) -> str:
    plain = f"{8 * precision.element} bits"
    if precision.quantized == "nf4":
        experts = " and experts" if card.experts and precision.experts else ""
        return f"linear layers{experts} in NF4 (4.13 bits), all else in {plain}"
    if precision.quantized == "stored":
        return f"as the checkpoint has them, {str(card.quantized).upper()}, all else in {plain}"
    expanded = f", expanded from {str(card.quantized).upper()}" if card.quantized else ""
    return plain + expanded
