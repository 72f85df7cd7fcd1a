"""Llama 4 scales the queries of its layers without rotary positions by where they stand: log-scaled attention.

The model itself counts positions from the length of a cache that all rows share. Rows of ours stand at different ones, so the
scaling is done here instead: on what the queries' projection gives, which in those layers is the query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launch.shard.stage import Passthrough, Stage


class Temper:
    """Scales one layer's queries; `positions` [rows, tokens] are set before each step.

    The factor is 1 + attn_scale * ln(1 + floor((position + 1) / floor_scale)), as in transformers' Llama4TextAttention.
    """

    def __init__(self, attention: Any) -> None:
        attention.attn_temperature_tuning = False
        self._scale, self._floor = float(attention.attn_scale), float(attention.floor_scale)
        self.positions = torch.zeros(1, 1, dtype=torch.int64)
        attention.q_proj.register_forward_hook(self._apply)

    def _apply(self, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        heights = torch.floor((self.positions.float() + 1.0) / self._floor)
        scales = torch.log1p(heights) * self._scale + 1.0
        return (output * scales[..., None]).to(output.dtype)


def tempered(stage: Stage) -> list[Temper]:
    """One for each layer of the stage that asks for it; the layers themselves stop doing it."""
    layers = (layer for layer in stage.decoder.layers if not isinstance(layer, Passthrough))
    attentions: list[Any] = [layer.self_attn for layer in layers if hasattr(layer, "self_attn")]
    asking = (one for one in attentions if getattr(one, "attn_temperature_tuning", False))
    return [Temper(attention) for attention in asking if not attention.use_rope]
