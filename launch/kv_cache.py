"""What each layer keeps of the tokens before: keys and values, a latent vector, a window of them, or a state of one size."""

from __future__ import annotations

from dataclasses import dataclass

from launch import architecture
from launch.architecture import Family
from launch.model_config import ModelConfig


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache of one sequence.

    `per_token` and `conv` are elements of the model's own type, `recurrent` are 4-byte floats; only the first grows with the
    sequence, and where there is a `window`, only up to it.
    """

    per_token: int
    window: int | None = None
    conv: int = 0
    recurrent: int = 0

    def tokens(self, length: int) -> int:
        """How many of a sequence's `length` tokens are kept."""
        return length if self.window is None else min(length, self.window)

    def size(self, length: int, element: int) -> int:
        """Bytes for a sequence of `length` tokens, with elements of `element` bytes."""
        return (self.per_token * self.tokens(length) + self.conv) * element + 4 * self.recurrent


def caches(config: ModelConfig, family: Family | None) -> tuple[LayerCache, ...]:
    """The cache of every layer, as transformers' DynamicCache keeps it.

    Per token: 2 x kv_heads x head_dim (MHA, GQA); kv_lora_rank + qk_rope_head_dim (MLA: the latent vector is what is kept);
    0 with linear attention, whose convolution keeps its kernel's last columns and whose recurrence a key x value matrix a head.
    """
    if config.optional("kv_lora_rank"):
        per_token = config.integer("kv_lora_rank") + config.integer("qk_rope_head_dim")
    else:
        per_token = 2 * architecture.kv_heads(config) * architecture.head_dim(config)
    window = config.optional("attention_chunk_size", "sliding_window")
    plain, bounded, linear = LayerCache(per_token), LayerCache(per_token, window), _linear(config)
    return tuple(
        {"full": plain, "window": bounded, "linear": linear}[_kind(config, family, index, window)]
        for index in range(config.layers)
    )


def _linear(config: ModelConfig) -> LayerCache:
    if not config.optional("linear_num_value_heads"):
        return LayerCache(0)
    key_dim, value_dim = config.integer("linear_key_head_dim"), config.integer("linear_value_head_dim")
    key_heads, value_heads = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
    columns = 2 * key_heads * key_dim + value_heads * value_dim
    return LayerCache(
        per_token=0,
        conv=columns * config.integer("linear_conv_kernel_dim"),
        recurrent=value_heads * key_dim * value_dim,
    )


def _kind(config: ModelConfig, family: Family | None, index: int, window: int | None) -> str:
    """Of layer `index`: from layer_types where config.json has them, else as the family's configuration class fills them in."""
    named = config.words("layer_types", config.layers)
    if named is None and not architecture.is_linear(config, index):
        return "window" if window is not None and _is_bounded(config, family, index) else "full"
    if named is None or "linear" in named[index]:
        return "linear"
    return "window" if window and ("sliding" in named[index] or "chunked" in named[index]) else "full"


def _is_bounded(config: ModelConfig, family: Family | None, index: int) -> bool:
    """Whether layer `index` sees only a window, where that has to be told from the other keys."""
    if not config.flag("use_sliding_window", default=True):
        return False
    if config.optional("attention_chunk_size"):  # Llama 4: layers without rotary positions see everything
        return (index + 1) % config.integer("no_rope_layer_interval", default=4) != 0
    if config.text.get("max_window_layers") is not None and "use_sliding_window" in config.text:
        return index >= config.count("max_window_layers")
    each = family.window if family is not None and family.window is not None else 0
    each = config.integer("sliding_window_pattern", default=each) if each > 2 else each
    return each == 0 or (index + 1) % each != 0
