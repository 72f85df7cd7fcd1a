"""Tokens are drawn as transformers would draw them, each row by its own rule and from its own seed."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from launch.inference.request import Sampling
from launch.inference.sampler import Row, draw, filtered, penalised, scores

VOCABULARY = 50


def _logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def _theirs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    scores = TemperatureLogitsWarper(sampling.temperature)(torch.empty(0), logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(torch.empty(0), scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(torch.empty(0), scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(torch.empty(0), scores)
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


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
def test_min_p_is_that_of_transformers(min_p: float) -> None:
    for sampling in (Sampling(temperature=0.8, min_p=min_p), Sampling(temperature=2, min_p=min_p, top_k=9, top_p=0.9)):
        logits = _logits(6)
        torch.testing.assert_close(filtered(logits[0], sampling), _theirs(logits, sampling)[0])


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_counts_prompt_and_answer_as_transformers_does(penalty: float) -> None:
    logits = _logits(7)
    row = Row(Sampling(repetition_penalty=penalty), prompt=[3, 8, 8], drawn=[1, 3])
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[3, 8, 8, 1, 3]]), logits)
    torch.testing.assert_close(penalised(logits[0], row), theirs[0])


def test_presence_and_frequency_count_the_answer_alone() -> None:
    row = Row(Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt=[0], drawn=[2, 4, 2])
    penalties = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.75])
    torch.testing.assert_close(penalised(torch.ones(5), row), 1 - penalties)


def test_a_penalty_keeps_the_likeliest_token_from_coming_again() -> None:
    logits = torch.tensor([[3.0, 2.9, 0.0]])
    row = Row(Sampling(presence_penalty=1.0))
    assert [draw(logits, [row])[0] for _ in range(3)] == [0, 1, 0]
    assert row.drawn == [0, 1, 0]


def test_scores_are_the_models_own_log_probabilities() -> None:
    logits = _logits(8, rows=2)
    told = scores(logits, [4, 0], 3)
    shares = logits.log_softmax(-1)
    for index, (own, best) in enumerate(told):
        assert own == pytest.approx(float(shares[index, [4, 0][index]]))
        assert [token for token, _ in best] == shares[index].argsort(descending=True)[:3].tolist()
        assert [share for _, share in best] == pytest.approx(shares[index].sort(descending=True).values[:3].tolist())
    assert scores(logits, [4, 0], 0)[0][1] == []


def test_the_logits_given_are_left_as_they_were() -> None:
    logits = _logits(1)
    before = logits.clone()
    draw(logits, [Row(Sampling(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2), prompt=[1, 2])])
    assert torch.equal(logits, before)


def test_temperature_0_takes_the_likeliest_whatever_else_is_asked() -> None:
    logits = _logits(2, rows=3)
    likeliest = logits.argmax(-1).tolist()
    assert draw(logits, [Row(Sampling()), Row(Sampling(top_k=5, seed=1)), Row(Sampling(top_p=0.5))]) == likeliest
    narrow = [Sampling(temperature=2, top_k=1), Sampling(temperature=2, top_p=1e-9), Sampling(temperature=1e-3)]
    assert draw(logits, [Row(sampling) for sampling in narrow]) == likeliest


def test_tokens_are_drawn_as_often_as_their_shares_say() -> None:
    sampling = Sampling(temperature=0.8, top_k=6, top_p=0.95, seed=4)
    logits, row = _logits(3), Row(sampling)
    draws = 4000
    for _ in range(draws):
        draw(logits, [row])
    counts = torch.bincount(torch.tensor(row.drawn), minlength=VOCABULARY).float()
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
    together = [Row(sampling) for sampling in samplings]
    for step in logits:
        draw(step, together)
    for index, sampling in enumerate(samplings):
        alone = Row(sampling)
        for step in logits:
            draw(step[index : index + 1], [alone])
        assert alone.drawn == together[index].drawn
    same = [Row(samplings[0]), Row(samplings[2])]
    for step in logits:
        draw(step[:1].expand(2, -1), same)
    assert same[0].drawn != same[1].drawn, "another seed draws otherwise"


def test_a_row_that_was_put_aside_goes_on_as_if_it_had_not_been() -> None:
    logits = [_logits(step) for step in range(12)]
    sampling = Sampling(temperature=1.5, seed=5)
    row = Row(sampling)
    for step in logits:
        draw(step, [row])
    again = Row(sampling, drawn=row.drawn[:7])
    for step in logits[7:]:
        draw(step, [again])
    assert again.drawn == row.drawn


def test_half_precision_logits_are_drawn_from_in_full() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=8)
    logits = _logits(9).bfloat16()
    assert draw(logits, [Row(sampling)]) == draw(logits.float(), [Row(sampling)])
