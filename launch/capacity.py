"""What a rank's memory must hold: weights, caches, what is trained and its state, activations, and what the runtime takes."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import NamedTuple

from cluster.errors import WrongInputError
from launch.model_card import ModelCard, Part
from launch.precision import Kind, Precision, Weight
from launch.split import Cut
from launch.workload import Serving, Training, Workload

MIB = 2**20
# A rank's process with torch, transformers and peft loaded is 0.40 GiB (measured); threads' arenas make it half a GiB.
_PROCESS = 512 * MIB
# The CUDA context, kernels' code, cuBLAS workspaces and what the allocator cannot give back: assumed, no Spark was measured.
_CUDA = 1536 * MIB
# Of a rank's three communicators (the world, forward, backward) NCCL keeps for each of at most 16 channels, in both directions,
# buffers of 4 MiB (NCCL_BUFFSIZE) and of the low-latency protocols, 1.5 MiB.
_NCCL = 3 * 16 * 2 * (4 * MIB + 3 * MIB // 2)
_GLOO = 64 * MIB
# Matrices in NF4 are multiplied as they are up to this many tokens at once on a GB10; for more, each is expanded first
# (bitsandbytes 0.50, backends/cuda/ops.py, sm121).
NF4_TOKENS = 256
# Weights whose output is added to the hidden states and not kept for the backward pass.
_OUTPUTS = ("o_proj", "out_proj", "down_proj")
# Bytes of optimizer state for each trained number: Adam's two moments in 32 bits, or in 8 with a 32-bit maximum for each block of
# 256 (Dettmers et al. 2022, arXiv:2110.02861). Adafactor's is by row and column, and worked out below.
_ADAM = {"adamw_torch": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int = 0
    kv_cache: int = 0
    lora: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    runtime: int = 0

    @property
    def total(self) -> int:
        """Everything together."""
        return sum(getattr(self, field.name) for field in fields(self))


class _Share(NamedTuple):
    """What one layer (or the embedding, or the head) takes, as far as it adds up over the layers of a stage."""

    weights: int = 0
    kv_cache: int = 0
    lora: int = 0
    trained: int = 0  # numbers
    optimizer: int = 0
    copies: int = 0  # 16-bit copies of trained 32-bit weights
    kept: int = 0  # activations kept of one micro-batch, without checkpointing

    def plus(self, other: _Share) -> _Share:
        """Both together."""
        return _Share(*map(operator.add, self, other))

    def minus(self, other: _Share) -> _Share:
        """What is left without the other."""
        return _Share(*map(operator.sub, self, other))


class Demand:
    """The memory that a model takes for a piece of work, for any cut of it.

    Worked out once for each kind of layer and summed beforehand, so that every possible cut can be tried.

    Raises:
        WrongInputError: config.json does not tell what sequences keep, or a packed weight's shape.
    """

    def __init__(self, card: ModelCard, work: Workload, precision: Precision, *, cuda: bool) -> None:
        self.card, self.work, self.precision, self.cuda = card, work, precision, cuda
        if isinstance(work, Serving) and any(part.cache is None for part in card.stack):
            raise WrongInputError(
                f"{card.source}: config.json does not name num_attention_heads, so nobody knows what a sequence takes",
                "download the model again",
            )
        alike = {id(part): self._layer(part) for part in card.kinds}
        layers = [alike[id(part)].plus(_Share(lora=4 * self._adapter(index))) for index, part in enumerate(card.stack)]
        self._sums = list(accumulate(layers, _Share.plus, initial=_Share()))
        self._embedding, self._head = self._end(card.embedding), self._end(card.head)
        self._largest = max(layer.kept for layer in layers)
        self._widest, self._expanded = self._matrices()

    def of(self, cut: Cut, *, in_flight: int, ranks: int) -> Memory:
        """What a stage takes that holds `cut` and keeps at most `in_flight` micro-batches between forward and backward."""
        own = self._own(cut)
        return Memory(
            weights=own.weights,
            kv_cache=own.kv_cache,
            lora=own.lora,
            gradients=4 * own.trained,
            optimizer=own.optimizer,
            activations=self._activations(own, cut, in_flight),
            runtime=_PROCESS + (_CUDA if self.cuda else 0) + ((_NCCL if self.cuda else _GLOO) if ranks > 1 else 0),
        )

    def whole(self, *, shards: int) -> Memory:
        """What each of two ranks takes where both run the whole model (DDP) and share out its state among `shards` (FSDP2, ZeRO-3).

        Trained state is divided; so are the weights, but for the largest layer, gathered while it is computed, and the next one. A
        quantised model stands on every rank whole: it is loaded before it can be shared out.
        """
        whole = self.of(Cut(0, self.card.layers, self.card.layers), in_flight=1, ranks=2)
        if shards == 1:
            return whole
        largest = max(after.weights - before.weights for before, after in pairwise(self._sums))
        return Memory(
            weights=whole.weights if self.precision.quantized else whole.weights // shards + 2 * largest,
            lora=whole.lora // shards,
            gradients=whole.gradients // shards,
            optimizer=whole.optimizer // shards,
            activations=whole.activations,
            runtime=whole.runtime,
        )

    # ---- what adds up over layers

    def _layer(self, part: Part) -> _Share:
        weights = sum(self.precision.size(weight) for weight in part.weights)
        if isinstance(self.work, Serving):
            assert part.cache is not None
            cache = self.work.sequences * part.cache.size(self.work.context, self.precision.compute)
            return _Share(weights=weights, kv_cache=cache)
        lora = sum(self.work.lora(weight) for weight in part.weights)
        return _Share(
            weights=weights,
            lora=4 * lora,  # peft keeps adapters in 32 bits
            trained=lora if self.work.rank else part.parameters,
            optimizer=sum(self._state(self.work, weight) for weight in part.weights),
            copies=0 if self.work.rank else part.parameters * self._cast,
            kept=self.work.tokens * self._kept(self.work, part),
        )

    def _end(self, part: Part) -> _Share:
        weights = sum(self.precision.size(weight) for weight in part.weights)
        if isinstance(self.work, Serving) or self.work.rank:
            return _Share(weights=weights)
        return _Share(
            weights=weights,
            trained=part.parameters,
            optimizer=sum(self._state(self.work, weight) for weight in part.weights),
            copies=part.parameters * self._cast,
        )

    def _adapter(self, index: int) -> int:
        return self.work.adapter[index] if isinstance(self.work, Serving) and self.work.adapter else 0

    @property
    def _cast(self) -> int:
        """Bytes of the 16-bit copy that autocast makes of a 32-bit number."""
        return self.precision.compute if self.precision.compute < self.precision.element else 0

    def _state(self, work: Training, weight: Weight) -> int:
        if weight.kind is Kind.BUFFER:
            return 0
        trained = work.lora(weight) if work.rank else weight.parameters
        if work.optimizer != "adafactor":
            return round(trained * _ADAM[work.optimizer])
        if work.rank:  # two matrices: rows x rank, rank x columns
            return 4 * (weight.rows + weight.columns + 2 * work.rank) if trained else 0
        alike = trained // (weight.rows * weight.columns) if weight.rows * weight.columns else 0
        return 4 * (alike * (weight.rows + weight.columns) if alike else trained)

    def _kept(self, work: Training, part: Part) -> int:
        """Bytes that autograd keeps of each token in one layer.

        In the manner of Korthikanti et al. 2022 (arXiv:2205.05198), for layers as transformers writes them: what linear modules put
        out, but for those that write to the hidden states; the result of attention, which keeps no matrix of scores, and of the
        activation function; each norm's input in 32 bits, and where it is trained what becomes of that. Modules that learn keep
        what they read: once for all that read the same, or each its own where it is cast (autocast, and peft's 32-bit adapters).
        Of a mixture each token keeps that of its experts, and what they put out.
        """
        compute, full = self.precision.compute, work.rank is None
        rows = {weight.name: weight.rows for weight in part.weights}
        kept, read = 4 * (self.card.heads or 0), dict[str, int]()
        for weight in part.weights:
            learns = full or work.lora(weight) > 0
            module = weight.name.removesuffix(".weight")
            if weight.kind is Kind.EXPERT:
                width = weight.parameters // (3 * self.card.experts * self.card.hidden_size)
                each = 2 * self.card.hidden_size + 4 * width if full else self.card.hidden_size + 3 * width
                kept += self.card.experts_per_token * compute * each
            elif weight.kind is Kind.LINEAR and module.endswith(_OUTPUTS):
                results = (not module.endswith("down_proj")) + (
                    learns and (compute < 4 or module.endswith("down_proj"))
                )
                kept += compute * weight.columns * results
            elif weight.kind is Kind.LINEAR:
                activated = {"gate_proj": weight.rows, "gate_up_proj": weight.rows // 2}.get(module.split(".")[-1], 0)
                kept += compute * (weight.rows + activated)
                if learns:
                    read[module if compute < 4 else module.rpartition(".")[0]] = weight.columns
            elif "norm" in module:
                width = rows.get(module.replace("_norm", "_proj.weight"), weight.parameters)
                kept += 4 * width * (2 if full else 1)
            elif weight.columns and full:  # a router
                kept += 4 * weight.columns
            if weight.kind is Kind.LINEAR and learns:
                kept += compute * (work.rank or 0)
        return kept + compute * sum(read.values())

    # ---- what a stage has once

    def _own(self, cut: Cut) -> _Share:
        own = self._sums[cut.end].minus(self._sums[cut.start])
        if cut.first:
            own = own.plus(self._embedding)
        if cut.last:
            own = own.plus(self._head)
            if self.card.tied and not cut.first:
                own = own.plus(self._embedding)
        return own

    def _activations(self, own: _Share, cut: Cut, in_flight: int) -> int:
        if isinstance(self.work, Serving):
            return self._serving(self.work, cut)
        work, hidden = self.work, self.card.hidden_size
        passed_on = work.tokens * hidden * self.precision.element  # hidden states between layers
        if work.checkpointing:
            kept = in_flight * (cut.end - cut.start) * passed_on + self._largest + own.copies
        else:
            kept = in_flight * (own.kept + own.copies)
        logits = work.tokens * self.card.vocab_size * self._logit if cut.last else 0
        # torch's AdamW works on all of a group at once, with one more copy of it, when the activations are gone.
        stepping = 4 * own.trained if work.optimizer == "adamw_torch" and self.cuda else 0
        return max(kept + logits + 2 * passed_on + self._expanded, stepping)

    @property
    def _logit(self) -> int:
        """Bytes for each logit while the loss is computed: itself, in 32 bits, its log-softmax and its gradient."""
        return 12 + (self.precision.compute if self.precision.compute < 4 else 0)

    def _serving(self, work: Serving, cut: Cut) -> int:
        """While a chunk of a prompt goes through one layer: hidden states, the widest step within a layer, and the mask."""
        compute = self.precision.compute
        through = work.chunk * (4 * self.card.hidden_size + 2 * self._widest) * compute
        mask = work.chunk * work.context * (1 + compute)  # as booleans, and as attention adds it
        logits = work.sequences * self.card.vocab_size * (compute + 3 * 4) if cut.last else 0  # and what sampling sorts
        return through + mask + logits + (self._expanded if work.chunk > NF4_TOKENS or not self.cuda else 0)

    def _matrices(self) -> tuple[int, int]:
        """How many elements a token has going into and out of the widest matrix; bytes of the largest quantised one, expanded.

        Experts are taken to be expanded one by one.
        """
        widest = expanded = 0
        for weight in (weight for part in self.card.kinds for weight in part.weights):
            routed = self.card.experts_per_token if weight.kind is Kind.EXPERT else 1
            widest = max(widest, routed * (weight.rows + weight.columns))
            if self.precision.is_quantized(weight):
                expanded = max(expanded, weight.rows * weight.columns * self.precision.compute)
        return widest, expanded


def rule_of_thumb(memory: int, *, bits: float = 4, kept_back: float = 0.2) -> int:
    """The largest model, in parameters, that `memory` bytes hold: so the DGX Spark was announced (FP4, 20% kept back)."""
    return int(memory * (1 - kept_back) * 8 / bits)
