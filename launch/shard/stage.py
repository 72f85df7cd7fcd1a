"""One rank's part of a model: the architecture itself, with every foreign layer replaced by a passthrough.

The model is transformers' own class, pruned before its weights are loaded, so conversions, rotary embeddings, masks and
per-layer attention types stay those of the architecture, and a rank reads and holds only its own tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicCache

from cluster.errors import WrongInputError
from launch.shard.load import load
from launch.shard.prune import Passthrough, check_seams, find_decoder, prune
from launch.split import Cut

__all__ = ["Passthrough", "Stage", "check_seams", "find_decoder", "load_config", "prune"]


def load_config(folder: Path) -> PreTrainedConfig:
    """The model's configuration; no code of the model's own is ever run.

    Raises:
        WrongInputError: transformers does not know the architecture, or finds the configuration wrong.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise WrongInputError(
            f"{folder / 'config.json'}: {str(error).splitlines()[0]}",
            "choose a model whose architecture transformers knows; code of a model's own is never run",
        ) from None


class Stage:
    """A loaded part of a causal language model: token ids or hidden states in, hidden states or logits out."""

    def __init__(self, model: PreTrainedModel, cut: Cut) -> None:
        self.model = model
        self.cut = cut
        self.decoder: Any = find_decoder(model)
        self.config = model.config
        self.device = model.device
        self.dtype = model.dtype
        self.hidden_size = int(model.config.get_text_config(decoder=True).hidden_size)

    @classmethod
    def load(
        cls,
        folder: Path,
        cut: Cut,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Literal["nf4"] | None = None,
        quantize_experts: bool = True,
    ) -> Stage:
        """Load this stage's tensors, and only those, from the safetensors of `folder`.

        With `quantization` linear modules are held in 4 bits, and fused experts too unless `quantize_experts` says no.

        Raises:
            WrongInputError: the architecture is not supported, or the checkpoint lacks tensors of this stage, or they are not
                what its configuration says; nothing was loaded then.
            RefusedError: it is quantised in a way that this device cannot keep.
        """
        model = load(
            folder,
            load_config(folder),
            cut,
            dtype=dtype,
            device=device,
            quantization=quantization,
            quantize_experts=quantize_experts,
        )
        if not cut.whole:
            check_seams(model)
        return cls(model, cut)

    def forward(
        self,
        inputs: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None = None,
        keep: int = 0,
    ) -> torch.Tensor:
        """Run this stage.

        Args:
            inputs: token ids [rows, tokens] on the first stage, else hidden states [rows, tokens, hidden].
            attention_mask: 1 for real tokens, [rows, past + tokens]; None when nothing is padded.
            position_ids: [rows, tokens].
            cache: this stage's keys and values, extended in place; None while training.
            keep: how many last positions get logits (0: all), on the last stage only.

        Returns:
            hidden states [rows, tokens, hidden], or on the last stage logits [rows, kept, vocabulary].
        """
        given: dict[str, Any] = {"input_ids": inputs} if self.cut.first else {"inputs_embeds": inputs}
        given |= {"attention_mask": attention_mask, "position_ids": position_ids}
        given |= {"past_key_values": cache, "use_cache": cache is not None}
        if self.cut.last:
            return cast("torch.Tensor", self.model(**given, logits_to_keep=keep).logits)
        return cast("torch.Tensor", self.decoder(**given).last_hidden_state)

    def new_cache(self) -> DynamicCache:
        """An empty cache for one group of sequences, with nothing in it for layers of other ranks."""
        cache = DynamicCache(config=self.config)
        for index in range(len(cache.layers)):
            if not self.cut.start <= index < self.cut.end:
                cache.layers[index] = DummyLayer()
        return cache
