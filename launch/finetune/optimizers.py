"""The optimizers of a recipe, and their state as tensors that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from cluster.errors import RefusedError, WrongInputError
from launch.recipe import FinetuneRecipe

# Adafactor's second moments are kept by row and column of a whole matrix: a rank that holds a slice of it would keep others.
WHOLE_MATRICES = frozenset({"adafactor"})


def check(recipe: FinetuneRecipe, strategy: str) -> None:
    """Refuse an optimizer that would compute something else under a strategy.

    Raises:
        RefusedError: adafactor where a rank holds slices of matrices; 8-bit state where blocks would be cut.
    """
    if strategy in ("fsdp2", "zero3") and recipe.optimizer != "adamw_torch":
        raise RefusedError(
            f"{recipe.name}: `optimizer: {recipe.optimizer}` keeps state of whole matrices, and `strategy: {strategy}` "
            "cuts them over both nodes",
            "use `optimizer: adamw_torch`, or `strategy: pipeline` or `ddp`",
        )


def make(recipe: FinetuneRecipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the recipe names; its learning rate is set before each step."""
    adam: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
        "weight_decay": recipe.weight_decay,
    }
    if recipe.optimizer == "adamw_torch":
        return torch.optim.AdamW(parameters, **adam)
    if recipe.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        made: torch.optim.Optimizer = AdamW8bit(parameters, **adam)
        return made
    return torch.optim.Adafactor(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


class Trained:
    """What a rank trains, by name, and its optimizer."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], recipe: FinetuneRecipe) -> None:
        self.named = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.optimizer = make(recipe, self.named.values())

    def update(self, rate: float) -> None:
        """Take one step at a learning rate, and let the gradients go."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and optimizer state of this rank: of a sharded parameter its own slice."""
        found = {}
        for name, parameter in self.named.items():
            found[f"weight/{name}"] = _local(parameter.detach())
            for key, value in self.optimizer.state.get(parameter, {}).items():
                kept = value if torch.is_tensor(value) else torch.tensor(value)
                found[f"{'tensor' if torch.is_tensor(value) else 'number'}/{name}/{key}"] = _local(kept)
        return found

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave.

        Raises:
            WrongInputError: the tensors are those of another model or recipe.
        """
        weights = {name.removeprefix("weight/") for name in tensors if name.startswith("weight/")}
        alike = weights == self.named.keys() and all(
            tensors[f"weight/{name}"].shape == _local(parameter).shape for name, parameter in self.named.items()
        )
        if not alike:
            raise WrongInputError(
                "the checkpoint holds other weights than this job trains",
                "go on with the recipe that it was made with, or leave out `resume_from_checkpoint`",
            )
        with torch.no_grad():
            for name, parameter in self.named.items():
                _local(parameter).copy_(tensors[f"weight/{name}"])
        self.optimizer.state.clear()
        for full, tensor in tensors.items():
            kind, _, rest = full.partition("/")
            name, _, key = rest.rpartition("/")
            if kind == "tensor":
                self.optimizer.state[self.named[name]][key] = _like(tensor, key, self.named[name])
            elif kind == "number":
                self.optimizer.state[self.named[name]][key] = tensor.item()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _like(tensor: torch.Tensor, key: str, parameter: nn.Parameter) -> torch.Tensor:
    """A tensor of an optimizer's state, on the parameter's device and spread as that is; a step counter stays on the CPU."""
    if key == "step":
        return tensor.clone()
    tensor = tensor.to(parameter.device, copy=True)
    if hasattr(parameter, "to_local"):
        from torch.distributed.tensor import DTensor

        spread: Any = parameter
        return DTensor.from_local(
            tensor, spread.device_mesh, spread.placements, shape=spread.shape, stride=spread.stride()
        )
    return tensor
