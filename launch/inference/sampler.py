"""Logits into tokens, each row by its own rule: penalties, temperature, top_k, top_p, min_p, and a draw that its seed decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from launch.inference.request import Sampling

# Below this the likeliest token is all that is ever drawn, and dividing by it would overflow.
GREEDY_BELOW = 1e-5
_64_BITS = 2**64


@dataclass
class Row:
    """A sequence as the drawing of its tokens needs it: its rule, its prompt, and what was drawn so far.

    Of a sequence that was put aside and is computed anew, `drawn` holds what was drawn before.
    """

    sampling: Sampling
    prompt: Sequence[int] = ()
    drawn: list[int] = field(default_factory=list)
    _seen: frozenset[int] | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.sampling.temperature <= GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether its logits depend on the tokens before."""
        rule = self.sampling
        return rule.repetition_penalty != 1 or rule.presence_penalty != 0 or rule.frequency_penalty != 0

    @property
    def seen(self) -> frozenset[int]:
        """The tokens of its prompt."""
        if self._seen is None:
            self._seen = frozenset(self.prompt)
        return self._seen


@torch.no_grad()
def draw(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row, which is noted in the row too.

    A draw depends on the row's seed and on how many were drawn before, and on nothing else: not on its neighbours, and not on
    whether the sequence was put aside in between.

    Args:
        logits: [rows, vocabulary], left as they are.
        rows: one for each.
    """
    tokens = [int(token) for token in logits.argmax(dim=-1).tolist()]
    for index, row in enumerate(rows):
        if row.has_penalties or not row.is_greedy:
            own = penalised(logits[index].float(), row) if row.has_penalties else logits[index].float()
            if row.is_greedy:
                tokens[index] = int(own.argmax())
            else:
                shares = filtered(own, row.sampling).cpu()
                generator = torch.Generator().manual_seed(_mixed(row.sampling.seed, len(row.drawn)))
                tokens[index] = int(torch.multinomial(shares, 1, generator=generator))
        row.drawn.append(tokens[index])
    return tokens


def penalised(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """Logits [vocabulary] less the row's penalties, by vLLM's definitions.

    Repetition divides the positive logits of tokens of prompt and answer and multiplies the negative ones (Keskar et al. 2019,
    arXiv:1909.05858); presence and frequency are taken from those of the answer's tokens (OpenAI's API reference).
    """
    rule, counts = row.sampling, Counter(row.drawn)
    logits = logits.clone()
    if rule.repetition_penalty != 1:
        repeated = _ids(sorted(row.seen | counts.keys()), logits)
        own = logits[repeated]
        logits[repeated] = torch.where(own > 0, own / rule.repetition_penalty, own * rule.repetition_penalty)
    if counts and (rule.presence_penalty or rule.frequency_penalty):
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[_ids(list(counts), logits)] -= rule.frequency_penalty * times + rule.presence_penalty
    return logits


def filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities [vocabulary] to draw from: temperature, then top_k, top_p and min_p, in transformers' order."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort()
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        outside[-1] = False  # the likeliest always stays
        logits = logits.masked_fill(outside.scatter(0, order, outside), -torch.inf)
    if sampling.min_p > 0:
        shares = logits.softmax(-1)
        logits = logits.masked_fill(shares < sampling.min_p * shares.max(), -torch.inf)
    return logits.softmax(-1)


@torch.no_grad()
def scores(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """The log probability of each token, and the `top` likeliest ones in its place with theirs, best first.

    They are the model's own, before penalties and temperature (as vLLM's `raw_logprobs`).

    Args:
        logits: [tokens, vocabulary].
    """
    shares = logits.float().log_softmax(-1)
    own = shares.gather(-1, _ids(list(tokens), logits)[:, None])[:, 0].tolist()
    best = shares.topk(min(top, shares.shape[-1]), dim=-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(mine, list(zip(ids, values, strict=True))) for mine, (ids, values) in zip(own, pairs, strict=True)]


def _ids(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _mixed(seed: int, count: int) -> int:
    """A 63-bit number in which seed and count are well mixed: SplitMix64's finaliser (Steele et al. 2014)."""
    value = (seed * 0x9E3779B97F4A7C15 + (count + 1) * 0xD1B54A32D192ED03) % _64_BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % _64_BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % _64_BITS
    return (value ^ (value >> 31)) >> 1
