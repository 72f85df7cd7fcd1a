"""A model without what other ranks hold: every foreign layer is a passthrough, and what cannot be cut so is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

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


def pruned_class(
    architecture: type[PreTrainedModel], cut: Cut, then: Callable[[PreTrainedModel], None] | None = None
) -> Any:
    """`architecture`, pruned to `cut` as soon as it is built (on the meta device, before any memory is taken).

    `then`, where given, changes it further.
    """
    if cut.whole and then is None:
        return architecture

    class Pruned(architecture):  # type: ignore[misc]
        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            if not cut.whole:
                prune(self, cut)
            if then is not None:
                then(self)

    # The loader and the quantizers look up their rules by these names.
    Pruned.__name__, Pruned.__qualname__, Pruned.__module__ = (
        architecture.__name__,
        architecture.__qualname__,
        architecture.__module__,
    )
    return Pruned
