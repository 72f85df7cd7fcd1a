"""`strategy: auto`: the ways to spread a fine-tune over two nodes, which of them is taken, and why. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALL = ("ddp", "pipeline", "fsdp2", "zero3")

_SHARED = "both ranks share one machine, where a second copy of the model or of its layers buys nothing"
_WHOLE = "the model fits one node: both learn at once, and gradients alone cross the link"
_STAYS = "quantised weights stay where they are, and activations alone cross the link"
_BUBBLE = "to gather the weights over the link would cost more than the pipeline's bubble"
_GATHER = "to gather the weights over the link costs less than the pipeline's bubble"
_ONLY = "nothing else fits"
_LEAST = "of those that fit it moves the least over the link"
_NONE = "nothing fits, and this lacks the least"


@dataclass(frozen=True)
class Option:
    """One strategy for a recipe.

    Args:
        strategy: its name.
        absent: why it cannot be had; empty where it can.
        lacking: bytes that the fullest rank has too few; 0 or less where it fits.
        step: predicted seconds of an optimizer step; None where nothing is known of the boxes' speeds.
    """

    strategy: str
    absent: str
    lacking: int
    step: float | None

    @property
    def fits(self) -> bool:
        """Whether it can be had, and there is room."""
        return not self.absent and self.lacking <= 0


@dataclass(frozen=True)
class Choice:
    """What `auto` has come to, of which options."""

    strategy: str
    reason: str
    options: tuple[Option, ...]


def choose(options: Sequence[Option], *, shared: bool, quantized: bool) -> Choice:
    """Take a strategy: ddp where the model fits one node, else the pipeline or fsdp2, by what the link costs.

    Args:
        options: one for each of ALL.
        shared: whether both ranks are on one machine.
        quantized: whether the weights are held quantised.
    """
    named = {option.strategy: option for option in options}
    strategy, reason = ("pipeline", _SHARED) if shared else _chosen(named, quantized=quantized)
    return Choice(strategy, reason, tuple(options))


def _chosen(named: dict[str, Option], *, quantized: bool) -> tuple[str, str]:
    fitting = [name for name in ALL if named[name].fits]
    if not fitting:
        had = [option for option in named.values() if not option.absent] or [named["pipeline"]]
        return min(had, key=lambda option: option.lacking).strategy, _NONE
    if "ddp" in fitting:
        return "ddp", _WHOLE
    if len(fitting) == 1:
        return fitting[0], _ONLY
    if "pipeline" in fitting and quantized:
        return "pipeline", _STAYS
    if {"pipeline", "fsdp2"} <= set(fitting):
        gathering, bubble = named["fsdp2"].step or 0, named["pipeline"].step or 0
        return ("pipeline", _BUBBLE) if bubble <= gathering else ("fsdp2", _GATHER)
    return fitting[0], _LEAST
