"""Tiny models with random weights, one for each way that an architecture is laid out; and a tokenizer of single bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_SMALL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
}
_MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False}
# Every other family whose sizes are told from config.json: its model_type, and what sets it apart.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral-window": ("mistral", {"sliding_window": 32}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
    "qwen3-moe-some": (
        "qwen3_moe",
        {**_MIXTURE, "num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen3-next": (
        "qwen3_next",
        {
            **_MIXTURE,
            "num_experts": 4,
            "shared_expert_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 8,
        },
    ),
    "gemma2": ("gemma2", {"sliding_window": 32}),
    "gemma3": ("gemma3_text", {"sliding_window": 32, "sliding_window_pattern": 3}),
    "phi3": ("phi3", {}),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}),
    "glm4": ("glm4", {}),
    "glm4-moe": (
        "glm4_moe",
        {
            **_MIXTURE,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **_MIXTURE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "v_head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "minimax-m2": ("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("granite", {"attention_bias": True}),
    "cohere2": ("cohere2", {"sliding_window": 32}),
    "olmo2": ("olmo2", {}),
    "llama4": (
        "llama4_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
        },
    ),
}


def config(architecture: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The configuration of one of FAMILIES."""
    model_type, own = FAMILIES[architecture]
    return transformers.AutoConfig.for_model(model_type, **{**_SMALL, **own, **changes})


def make(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    """Save a model and its tokenizer in `folder`."""
    if architecture in FAMILIES:
        torch.manual_seed(7)
        transformers.AutoModelForCausalLM.from_config(config(architecture, **changes)).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return folder
    name, own = ARCHITECTURES[architecture]
    small = getattr(transformers, f"{name}Config")(**{**_SMALL, **own, **changes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(small)
    # The usual initialisation is so small that logits are nearly equal, and greedy choices would hang on rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes as tokens 0 to 255, then end of text and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<end>": 256, "<pad>": 257}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
