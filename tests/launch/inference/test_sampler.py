"""Tokens are drawn as transformers would draw them, each row by its own rule and from its own seed."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from launch.inference.request import Sampling
from launch.inference.sampler import Sampler, filtered

VOCABULARY = 50


def _logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def _theirs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    scores = TemperatureLogitsWarper(sampling.temperature)(torch.empty(0), logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(torch.empty(0), scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(torch.empty(0), scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, VOCABULARY - 1, VOCABULARY, 1000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999, 1.0])
def test_the_shares_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for seed in range(5):
        logits = _logits(seed)
        ours = filtered(logits[0], sampling)
        assert torch.equal(ours > 0, _theirs(logits, sampling)[0] > 0)
        torch.testing.assert_close(ours, _theirs(logits, sampling)[0])
        assert float(ours.sum()) == pytest.approx(1)


def test_equal_logits_are_filtered_as_transformers_does() -> None:
    level = torch.zeros(1, VOCABULARY)
    level[0, 7] = 1.0
    for sampling in (Sampling(temperature=1, top_k=3), Sampling(temperature=1, top_p=0.5)):
        torch.testing.assert_close(filtered(level[0], sampling), _theirs(level, sampling)[0])


def test_the_logits_given_are_left_as_they_were() -> None:
    logits = _logits(1)
    before = logits.clone()
    Sampler([Sampling(temperature=0.5, top_k=3, top_p=0.5)]).draw(logits)
    assert torch.equal(logits, before)


def test_temperature_0_takes_the_likeliest_whatever_else_is_asked() -> None:
    logits = _logits(2, rows=3)
    drawn = Sampler([Sampling(), Sampling(top_k=5, seed=1), Sampling(top_p=0.5, seed=2)]).draw(logits)
    assert (drawn.dtype, drawn.tolist()) == (torch.int64, logits.argmax(-1).tolist())
    narrow = [Sampling(temperature=2, top_k=1), Sampling(temperature=2, top_p=1e-9), Sampling(temperature=1e-3)]
    assert Sampler(narrow).draw(logits).tolist() == logits.argmax(-1).tolist()


def test_tokens_are_drawn_as_often_as_their_shares_say() -> None:
    sampling = Sampling(temperature=0.8, top_k=6, top_p=0.95, seed=4)
    logits, sampler = _logits(3), Sampler([sampling])
    draws = 4000
    counts = torch.zeros(VOCABULARY)
    for _ in range(draws):
        counts[sampler.draw(logits)[0]] += 1
    shares = filtered(logits[0], sampling)
    assert counts[shares == 0].sum() == 0
    possible = shares > 0
    assert possible.sum() >= 3
    expected = draws * shares[possible]
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    assert chi_square < 20.5, "the 99.9 % quantile for 5 degrees of freedom; the seed is fixed"


def test_a_row_draws_the_same_whatever_its_neighbours_are() -> None:
    logits = [_logits(step, rows=3) for step in range(12)]
    samplings = [Sampling(temperature=1.5, seed=seed) for seed in (5, 5, 6)]
    together = Sampler(samplings)
    rows = torch.stack([together.draw(step) for step in logits], dim=1)
    for row, sampling in enumerate(samplings):
        alone = Sampler([sampling])
        assert [int(alone.draw(step[row : row + 1])[0]) for step in logits] == rows[row].tolist()
    same = Sampler([samplings[0], samplings[2]])
    first = [same.draw(step[:1].expand(2, -1)).tolist() for step in logits]
    assert any(left != right for left, right in first), "another seed draws otherwise"


def test_half_precision_logits_are_drawn_from_in_full() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=8)
    logits = _logits(9).bfloat16()
    assert Sampler([sampling]).draw(logits).tolist() == Sampler([sampling]).draw(logits.float()).tolist()
