"""A small base model made on the spot: a byte-level BPE tokenizer trained on given text, and a Llama with random weights.

No hub can be assumed where sparkctl is rehearsed, and LoRA on random weights stays gibberish, so a demonstration
trains its own base.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launch.chat import PLAIN_TEMPLATE

END = "<|end|>"
PADDING = "<|pad|>"


def make(
    folder: Path, texts: Iterable[str], *, vocabulary: int, hidden: int, layers: int, positions: int, seed: int
) -> Path:
    """Write tokenizer, configuration and random weights to `folder`, as any model folder has them.

    Args:
        vocabulary: how many tokens the tokenizer may have.
        hidden: the width; heads are 32 wide, the feed-forward part 8/3 as wide (Touvron et al. 2023).
        positions: the longest sequence, in tokens.
    """
    tokenizer = _tokenizer(texts, vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=True
    )  # a name is one word, at the start of a line too
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PADDING)
    made.chat_template = PLAIN_TEMPLATE
    return made
