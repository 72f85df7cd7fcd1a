"""What a recipe asks of a model: sequences to serve or samples to learn from, and how the weights are held for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.errors import WrongInputError
from launch.model_card import ModelCard
from launch.precision import Kind, Precision, Weight
from launch.recipe import FinetuneRecipe, InferenceRecipe

# A linear module by birth though it routes, so that peft adapts it with the others.
_LINEAR_ROUTER = "feed_forward.router.weight"


@dataclass(frozen=True)
class Serving:
    """`sequences` at once of up to `context` tokens each, prompts going through `chunk` tokens at a time.

    `adapter` are the elements of a LoRA adapter in each layer, empty without one.
    """

    sequences: int
    context: int
    chunk: int
    adapter: tuple[int, ...] = ()


@dataclass(frozen=True)
class Training:
    """One optimizer step: `micro_batches` of `rows` samples of up to `length` tokens each.

    `rank` is that of the LoRA matrices, None when all weights are trained; `targets` are the modules adapted, None for all
    linear ones.
    """

    rows: int
    length: int
    micro_batches: int
    checkpointing: bool
    optimizer: Literal["adamw_torch", "adamw_8bit", "adafactor"]
    rank: int | None
    targets: frozenset[str] | None

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.rows * self.length

    def lora(self, weight: Weight) -> int:
        """Elements of the LoRA matrices beside a weight: rank x (rows + columns) (Hu et al. 2021, arXiv:2106.09685).

        Raises:
            WrongInputError: the weight is packed, and its shape is not known.
        """
        if self.rank is None or not self._adapts(weight):
            return 0
        if not weight.rows:
            raise WrongInputError(
                f"{weight.name}: the checkpoint holds it packed, and this model's shapes are not known",
                "start from the 16-bit checkpoint with `adapter: qlora`",
            )
        return self.rank * (weight.rows + weight.columns)

    def _adapts(self, weight: Weight) -> bool:
        if weight.kind is not Kind.LINEAR and weight.name != _LINEAR_ROUTER:
            return False
        if self.targets is None:
            return True
        # As peft matches names: the whole of it, or its end after a dot.
        module = f"layers.0.{weight.name}".removesuffix(".weight")
        return any(module == target or module.endswith(f".{target}") for target in self.targets)


Workload = Serving | Training


def of_recipe(recipe: FinetuneRecipe | InferenceRecipe, adapter: tuple[int, ...] = ()) -> Workload:
    """What the recipe asks for; `adapter` as in Serving."""
    if isinstance(recipe, InferenceRecipe):
        return Serving(recipe.max_num_seqs, recipe.max_model_len, recipe.max_num_batched_tokens, adapter)
    return Training(
        rows=recipe.micro_batch_size,
        length=recipe.sequence_len,
        micro_batches=recipe.gradient_accumulation_steps,
        checkpointing=recipe.gradient_checkpointing,
        optimizer=recipe.optimizer,
        rank=None if recipe.adapter == "full" else recipe.lora_r,
        targets=frozenset(recipe.lora_target_modules) if recipe.lora_target_modules else None,
    )


def precision(recipe: FinetuneRecipe | InferenceRecipe, card: ModelCard, *, cuda: bool) -> Precision:
    """How the ranks hold the weights, on a GPU or on a CPU.

    Trained weights are 32-bit (small steps would be rounded away in 16), frozen ones 16-bit on a GPU and 32-bit on a CPU. A
    checkpoint that comes in NF4, or on a GPU in FP8, is held as it is; any other is expanded: transformers has no kernels for
    MXFP4 without the hub's, and none for FP8 on a CPU.
    """
    if isinstance(recipe, FinetuneRecipe):
        sixteen = cuda if recipe.bf16 == "auto" else bool(recipe.bf16)
        wanted, experts = recipe.adapter == "qlora", recipe.quantize_moe_experts
        full = recipe.adapter == "full"
    else:
        sixteen, wanted, experts, full = cuda, recipe.quantization == "nf4", True, False
    element = 2 if sixteen and not full else 4
    compute = 2 if sixteen else 4
    if wanted and card.quantized != "nf4":
        return Precision("nf4", element, compute, experts)
    kept = card.quantized == "nf4" or (card.quantized == "fp8" and cuda)
    return Precision("stored" if kept and not full else None, element, compute)
