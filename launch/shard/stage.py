"""One rank's part of a model: the architecture itself, with every foreign layer replaced by a passthrough.

The model is transformers' own class, pruned before its weights are loaded, so conversions, rotary embeddings, masks and
per-layer attention types stay those of the architecture, and a rank reads and holds only its own tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicCache

from cluster.errors import WrongInputError
from launch.split import Cut

# By what a decoder multiplies its embeddings in its own forward pass (Granite): only the first stage may.
EMBEDDING_SCALE = "embedding_multiplier"


class Passthrough(nn.Module):
    """Stands where another rank's layer would be, so that layer numbers and state-dict keys stay global."""

    def __init__(self, foreign: nn.Module) -> None:
        super().__init__()
        # Some decoders read the kind of attention off the layer before they call it.
        self.__dict__.update({name: value for name, value in vars(foreign).items() if isinstance(value, str)})

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """Return `hidden_states`, shape [rows, tokens, hidden], unchanged."""
        return hidden_states


def find_decoder(model: nn.Module) -> nn.Module:
    """The one module that holds both the token embedding and the layers (`get_decoder()` is not reliable for that).

    Raises:
        WrongInputError: the architecture is laid out otherwise, so it cannot be cut by layers.
    """
    found = [
        m
        for m in model.modules()
        if isinstance(getattr(m, "layers", None), nn.ModuleList) and hasattr(m, "embed_tokens")
    ]
    if len(found) != 1 or not hasattr(found[0], "norm"):
        name = type(model).__name__
        raise WrongInputError(
            f"{name}: not a plain stack of layers (found {len(found)} modules with .layers, .embed_tokens and .norm)",
            "only decoders with one embedding, one list of layers and one final norm can be split over two nodes",
        )
    return found[0]


def prune(model: PreTrainedModel, cut: Cut) -> None:
    """Replace, in place, everything of `model` that stage `cut` does not hold."""
    decoder: Any = find_decoder(model)
    for index, layer in enumerate(decoder.layers):
        if not cut.start <= index < cut.end:
            decoder.layers[index] = Passthrough(layer)
    tied = bool(getattr(model, "all_tied_weights_keys", {}))
    if not cut.first and not (cut.last and tied):
        decoder.embed_tokens = nn.Module()
    if not cut.first and hasattr(decoder, EMBEDDING_SCALE):
        setattr(decoder, EMBEDDING_SCALE, 1.0)
    if not cut.last:
        decoder.norm = nn.Identity()
        model.set_output_embeddings(cast("Any", nn.Identity()))
        # Nothing is left to tie, and the loader would look for the missing half of the tie.
        cast("Any", model).all_tied_weights_keys = {}


class _PlusOne(nn.Module):
    """Stands for the norm while seams are tried, so that what comes out shows what was handed to it."""

    def __init__(self, like: PreTrainedModel) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones((), device=like.device, dtype=like.dtype), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden_states + self.one


@torch.inference_mode()
def check_seams(model: PreTrainedModel) -> None:
    """Make sure that the decoder hands hidden states to its layers as they come, and nothing else from layer to layer.

    Tried out with empty layers: models that scale or normalise or widen the embeddings, or carry something beside
    the hidden states, would do so again on every stage, and be silently wrong.

    Raises:
        WrongInputError: it does not, so it cannot be cut by layers.
    """
    decoder: Any = find_decoder(model)
    hidden = torch.linspace(-1, 1, 2 * model.config.get_text_config(decoder=True).hidden_size)
    hidden = hidden.reshape(1, 2, -1).to(model.device, model.dtype)
    positions = torch.arange(2, device=model.device)[None]
    layers, norm, scale = decoder.layers, decoder.norm, getattr(decoder, EMBEDDING_SCALE, None)
    if scale is not None:
        setattr(decoder, EMBEDDING_SCALE, 1.0)  # on later stages `prune` has done so for good
    decoder.layers, decoder.norm = nn.ModuleList(Passthrough(layer) for layer in layers), _PlusOne(model)
    try:
        handed_on = decoder(inputs_embeds=hidden, position_ids=positions, use_cache=False).last_hidden_state
        cuttable = torch.equal(handed_on, hidden + 1)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        cuttable = False  # it asks more of a layer than to take and return hidden states
    finally:
        decoder.layers, decoder.norm = layers, norm
        if scale is not None:
            setattr(decoder, EMBEDDING_SCALE, scale)
    if not cuttable:
        raise WrongInputError(
            f"{type(model).__name__}: does more between its layers than to hand on hidden states, so it cannot be cut there",
            "set `nodes: 1` to run it whole on one node, or choose another model",
        )


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
    def load(cls, folder: Path, cut: Cut, *, dtype: torch.dtype, device: torch.device) -> Stage:
        """Load this stage's tensors, and only those, from the safetensors of `folder`.

        Raises:
            WrongInputError: the architecture is not supported, or the checkpoint lacks tensors of this stage.
        """
        config = load_config(folder)
        architecture = _causal_class(config, folder)
        try:
            model, info = _pruned_class(architecture, cut).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                output_loading_info=True,
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, OSError, SafetensorError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise WrongInputError(f"{folder}: cannot be loaded: {reason}", "download the model again") from error
        if missing := sorted(info["missing_keys"]):
            raise WrongInputError(
                f"{folder}: {len(missing)} tensors of {cut} are not in the checkpoint, first {missing[0]}",
                "download the model again, or check that its safetensors belong to its config.json",
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


def _causal_class(config: PreTrainedConfig, folder: Path) -> type[PreTrainedModel]:
    try:
        return cast("type[PreTrainedModel]", AutoModelForCausalLM._model_mapping[type(config)])
    except KeyError:
        raise WrongInputError(
            f"{folder / 'config.json'}: model_type {config.model_type!r} is no causal language model that transformers knows",
            "choose a text-generation model",
        ) from None


def _pruned_class(architecture: type[PreTrainedModel], cut: Cut) -> Any:
    """`architecture`, pruned to `cut` as soon as it is built (on the meta device, before any memory is taken)."""
    if cut.whole:
        return architecture

    class Pruned(architecture):  # type: ignore[misc]
        # The checkpoint holds the other ranks' tensors too; they are left unread.
        _keys_to_ignore_on_load_unexpected = (r".*",)

        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            prune(self, cut)

    # The loader and the quantizers look up their rules by these names.
    Pruned.__name__, Pruned.__qualname__, Pruned.__module__ = (
        architecture.__name__,
        architecture.__qualname__,
        architecture.__module__,
    )
    return Pruned
