"""Logits into tokens, each row by its own rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from launch.inference.request import Sampling

# Below this the likeliest token is all that is ever drawn, and dividing by it would overflow.
GREEDY_BELOW = 1e-5


class Sampler:
    """Draws for the sequences of one group. A row has a generator of its own: its answer does not depend on its neighbours."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self._samplings = list(samplings)
        self._generators = [torch.Generator().manual_seed(sampling.seed) for sampling in samplings]

    @torch.no_grad()
    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Token ids, int64 [rows] on the CPU, for logits [rows, vocabulary]."""
        tokens = logits.argmax(dim=-1).cpu()
        for row, (sampling, generator) in enumerate(zip(self._samplings, self._generators, strict=True)):
            if sampling.temperature > GREEDY_BELOW:
                shares = filtered(logits[row].float().cpu(), sampling)
                tokens[row] = torch.multinomial(shares, 1, generator=generator)[0]
        return tokens


def filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities [vocabulary] to draw from: temperature, then top_k, then top_p, in transformers' order."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort()
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        outside[-1] = False  # the likeliest always stays
        logits = logits.masked_fill(outside.scatter(0, order, outside), -torch.inf)
    return logits.softmax(-1)
