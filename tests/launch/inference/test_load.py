"""What `bench serve` makes of its timings."""

from __future__ import annotations

import pytest

from cluster.errors import FailedError
from launch.inference import load
from launch.inference.client import Client
from launch.inference.load import Load, Timing, percentiles


def test_percentiles_are_nearest_ranks() -> None:
    assert percentiles([float(value) for value in range(1, 101)]) == {50: 50.0, 90: 90.0, 99: 99.0}
    assert percentiles([3.0, 1.0, 2.0]) == {50: 2.0, 90: 3.0, 99: 3.0}
    assert percentiles([]) == {}


def test_time_per_token_counts_the_gaps() -> None:
    assert Timing(first=1.0, last=3.0, tokens=5).per_token == 0.5
    assert Timing(first=1.0, last=1.0, tokens=1).per_token is None


def test_a_load_that_nobody_answers_fails() -> None:
    with pytest.raises(FailedError, match=r"none of 2 requests was answered: the endpoint at 127\.0\.0\.1:1 does not"):
        load.run(Client("127.0.0.1", 1, ""), "model", Load(requests=2))
