"""The tensors that a model has, from its config.json alone: what transformers would make of it, by name and shape.

One `Family` for each model_type, in the terms in which decoders differ. A test builds every family on torch's meta device and
compares names and shapes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.errors import WrongInputError
from launch.model_config import ModelConfig

# The name of a tensor, within its layer or within the model, and its shape.
Shape = tuple[str, tuple[int, ...]]
# True, False, or what config.json says under the key (first the key, then the default).
Switch = bool | tuple[str, bool]

_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
_SANDWICH_NORMS = (*_LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_ATTENTION_BIAS = ("attention_bias", False)


@dataclass(frozen=True)
class Family:
    """How one model_type's layers are laid out.

    `experts` is the key of how wide an expert is, None for models without experts; `window` says which layers see only a
    window where config.json has no layer_types: all, or all but each n-th.
    """

    norms: tuple[str, ...] = _LLAMA_NORMS
    qkv_bias: Switch = False
    out_bias: Switch = False
    mlp_bias: Switch = False
    head_norm: Switch = False  # q_norm and k_norm over one head
    wide_norm: bool = False  # q_norm and k_norm over all heads
    fused_qkv: bool = False
    fused_gate_up: bool = False
    gated_query: bool = False
    sinks: bool = False
    latent: bool = False  # multi-head latent attention
    experts: str | None = None
    expert_layout: Literal["out-in", "in-out"] = "out-in"
    expert_bias: bool = False
    feed_forward: str = "mlp"
    router: str = "gate"
    tied: bool = False
    window: int | None = None  # 0: every layer; n: all but each n-th


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, mlp_bias=("mlp_bias", False)),
    "mistral": Family(window=0),
    "mixtral": Family(experts="intermediate_size", window=0),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, head_norm=True),
    "qwen3_moe": Family(
        qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, head_norm=True, experts="moe_intermediate_size"
    ),
    "qwen3_next": Family(
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        head_norm=True,
        gated_query=True,
        experts="moe_intermediate_size",
    ),
    "gemma2": Family(norms=_SANDWICH_NORMS, qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, tied=True, window=2),
    "gemma3_text": Family(
        norms=_SANDWICH_NORMS,
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        head_norm=True,
        tied=True,
        window=6,
    ),
    "phi3": Family(fused_qkv=True, fused_gate_up=True, window=0),
    "gpt_oss": Family(
        qkv_bias=("attention_bias", True),
        out_bias=("attention_bias", True),
        sinks=True,
        experts="intermediate_size",
        expert_layout="in-out",
        expert_bias=True,
        router="router",
        window=2,
    ),
    "glm4": Family(
        norms=(*_LLAMA_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
        qkv_bias=("attention_bias", True),
        fused_gate_up=True,
    ),
    "glm4_moe": Family(qkv_bias=_ATTENTION_BIAS, head_norm=("use_qk_norm", False), experts="moe_intermediate_size"),
    "deepseek_v3": Family(latent=True, experts="moe_intermediate_size"),
    "minimax_m2": Family(wide_norm=True, experts="intermediate_size"),
    "granite": Family(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, mlp_bias=("mlp_bias", False)),
    "cohere2": Family(
        norms=("input_layernorm",), qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, tied=True, window=4
    ),
    "olmo2": Family(
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        wide_norm=True,
    ),
    "llama4_text": Family(
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        experts="intermediate_size",
        expert_layout="in-out",
        feed_forward="feed_forward",
        router="router",
    ),
}
# A model of several parts: the part that reads and writes text.
_INNER = {"gemma3": "gemma3_text", "llama4": "llama4_text"}


def family_of(config: ModelConfig) -> Family | None:
    """The family of a configuration; None where this version does not know its layers."""
    name = str(config.text.get("model_type") or config.model_type)
    return FAMILIES.get(_INNER.get(name, name))


def head_dim(config: ModelConfig) -> int:
    """The width of one attention head."""
    return config.integer("head_dim", default=config.integer("hidden_size") // config.integer("num_attention_heads"))


def kv_heads(config: ModelConfig) -> int:
    """How many heads keys and values have: all (MHA), or fewer, each shared by several queries (GQA)."""
    return config.integer("num_key_value_heads", default=config.integer("num_attention_heads"))


def experts(config: ModelConfig) -> int:
    """How many experts a layer that has any has; 0 for a model without."""
    return config.optional("num_local_experts", "n_routed_experts", "num_experts") or 0


def experts_per_token(config: ModelConfig) -> int:
    """How many of them each token goes through."""
    return config.integer("num_experts_per_tok", default=1) if experts(config) else 0


def is_linear(config: ModelConfig, index: int) -> bool:
    """Whether layer `index` has linear attention, whose state does not grow with the sequence."""
    kinds = config.words("layer_types", config.layers)
    if kinds is not None:
        return kinds[index] == "linear_attention"
    interval = config.optional("full_attention_interval")
    if interval is None:
        interval = 4 if config.model_type == "qwen3_next" else 1
    return (index + 1) % interval != 0


def layer(config: ModelConfig, family: Family, index: int) -> list[Shape]:
    """The tensors of layer `index`, by their names within it. Experts are fused: [experts, out, in] or [experts, in, out]."""
    hidden = config.integer("hidden_size")
    shapes: list[Shape] = [(f"{norm}.weight", (hidden,)) for norm in family.norms]
    if family.latent:
        shapes += _latent_attention(config, hidden)
    elif is_linear(config, index):
        shapes += _linear_attention(config, hidden)
    else:
        shapes += _attention(config, family, hidden)
    if family.experts is not None and _has_experts(config, index):
        return [*shapes, *_mixture(config, family, hidden)]
    width = config.integer("intermediate_size_mlp", "intermediate_size")
    return [*shapes, *_mlp(config, family, family.feed_forward, hidden, width)]


def around(config: ModelConfig, *, tied: bool) -> list[Shape]:
    """The tensors outside of the layers: embedding, final norm and, unless it is the embedding, the head."""
    hidden, vocabulary = config.integer("hidden_size"), config.integer("vocab_size")
    head = [] if tied else [("lm_head.weight", (vocabulary, hidden))]
    return [("model.embed_tokens.weight", (vocabulary, hidden)), ("model.norm.weight", (hidden,)), *head]


def unknown(config: ModelConfig) -> WrongInputError:
    """What is said of a model_type whose sizes cannot be told from config.json alone."""
    name = config.text.get("model_type") or config.model_type
    return WrongInputError(
        f"{config.where}: model_type {name!r}: its sizes cannot be told from config.json alone",
        "download its safetensors: their headers tell",
    )


def _attention(config: ModelConfig, family: Family, hidden: int) -> Iterator[Shape]:
    size = head_dim(config)
    query, key = config.integer("num_attention_heads") * size, kv_heads(config) * size
    if family.fused_qkv:
        yield "self_attn.qkv_proj.weight", (query + 2 * key, hidden)
    else:
        bias = _on(config, family.qkv_bias)
        for name, rows in (("q_proj", query * (2 if family.gated_query else 1)), ("k_proj", key), ("v_proj", key)):
            yield from _linear(f"self_attn.{name}", rows, hidden, bias=bias)
    yield from _linear("self_attn.o_proj", hidden, query, bias=_on(config, family.out_bias))
    if family.wide_norm or _on(config, family.head_norm):
        yield "self_attn.q_norm.weight", (query if family.wide_norm else size,)
        yield "self_attn.k_norm.weight", (key if family.wide_norm else size,)
    if family.sinks:
        yield "self_attn.sinks", (config.integer("num_attention_heads"),)


def _latent_attention(config: ModelConfig, hidden: int) -> Iterator[Shape]:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are made of a short latent vector."""
    heads, bias = config.integer("num_attention_heads"), config.flag("attention_bias")
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    value, latent = config.integer("v_head_dim"), config.integer("kv_lora_rank")
    query = config.optional("q_lora_rank")
    if query is None:
        yield "self_attn.q_proj.weight", (heads * (nope + rope), hidden)
    else:
        yield from _linear("self_attn.q_a_proj", query, hidden, bias=bias)
        yield "self_attn.q_a_layernorm.weight", (query,)
        yield "self_attn.q_b_proj.weight", (heads * (nope + rope), query)
    yield from _linear("self_attn.kv_a_proj_with_mqa", latent + rope, hidden, bias=bias)
    yield "self_attn.kv_a_layernorm.weight", (latent,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), latent)
    yield from _linear("self_attn.o_proj", hidden, heads * value, bias=bias)


def _linear_attention(config: ModelConfig, hidden: int) -> Iterator[Shape]:
    """The gated delta rule (Yang et al. 2024, arXiv:2412.06464) as Qwen3-Next has it."""
    key_heads, value_heads = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
    key = key_heads * config.integer("linear_key_head_dim")
    value = value_heads * config.integer("linear_value_head_dim")
    yield "linear_attn.dt_bias", (value_heads,)
    yield "linear_attn.A_log", (value_heads,)
    yield "linear_attn.conv1d.weight", (2 * key + value, 1, config.integer("linear_conv_kernel_dim"))
    yield "linear_attn.in_proj_qkvz.weight", (2 * key + 2 * value, hidden)
    yield "linear_attn.in_proj_ba.weight", (2 * value_heads, hidden)
    yield "linear_attn.norm.weight", (config.integer("linear_value_head_dim"),)
    yield "linear_attn.out_proj.weight", (hidden, value)


def _has_experts(config: ModelConfig, index: int) -> bool:
    """Whether layer `index` is a mixture of experts, as the families say it: from a layer on, each n-th, or by number."""
    named = config.numbers("moe_layers")
    if named is not None:
        return index in named
    each = config.optional("decoder_sparse_step", "interleave_moe_layer_step") or 1
    dense = config.numbers("mlp_only_layers") or ()
    return (
        experts(config) > 0
        and index >= config.count("first_k_dense_replace")
        and index not in dense
        and (index + 1) % each == 0
    )


def _mixture(config: ModelConfig, family: Family, hidden: int) -> Iterator[Shape]:
    assert family.experts is not None
    count, width, inside = experts(config), config.integer(family.experts), family.feed_forward
    yield f"{inside}.{family.router}.weight", (count, hidden)
    wide, narrow = (2 * width, hidden), (hidden, width)
    if family.expert_layout == "in-out":
        wide, narrow = wide[::-1], narrow[::-1]
    yield f"{inside}.experts.gate_up_proj", (count, *wide)
    yield f"{inside}.experts.down_proj", (count, *narrow)
    if family.expert_bias:
        yield f"{inside}.{family.router}.bias", (count,)
        yield f"{inside}.experts.gate_up_proj_bias", (count, 2 * width)
        yield f"{inside}.experts.down_proj_bias", (count, hidden)
    shared = config.count("n_shared_experts")
    if shared:
        yield from _mlp(config, family, f"{inside}.shared_experts", hidden, shared * width)
    elif inside == "feed_forward":
        yield from _mlp(config, family, f"{inside}.shared_expert", hidden, width)
    elif config.optional("shared_expert_intermediate_size"):
        beside = config.integer("shared_expert_intermediate_size")
        yield from _mlp(config, family, f"{inside}.shared_expert", hidden, beside)
        yield f"{inside}.shared_expert_gate.weight", (1, hidden)


def _mlp(config: ModelConfig, family: Family, name: str, hidden: int, width: int) -> Iterator[Shape]:
    bias = _on(config, family.mlp_bias)
    if family.fused_gate_up:
        yield f"{name}.gate_up_proj.weight", (2 * width, hidden)
    else:
        yield from _linear(f"{name}.gate_proj", width, hidden, bias=bias)
        yield from _linear(f"{name}.up_proj", width, hidden, bias=bias)
    yield from _linear(f"{name}.down_proj", hidden, width, bias=bias)


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Iterator[Shape]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _on(config: ModelConfig, switch: Switch) -> bool:
    return switch if isinstance(switch, bool) else config.flag(*switch)
