"""`logs --since`: what a time names, and where in a log it lies."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from cluster.errors import WrongInputError
from launch.log_times import moment, offset

NOW = datetime(2026, 11, 26, 8, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "ago"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1.5 h", 5400), (" 5s ", 5)]
)
def test_so_long_ago(given: str, ago: float) -> None:
    assert moment(given, NOW) == NOW - timedelta(seconds=ago)


def test_a_time_of_any_zone() -> None:
    assert moment("2026-11-26T08:30:00+01:00", NOW) == datetime(2026, 11, 26, 7, 30, tzinfo=UTC)
    assert moment("2026-11-26", NOW).tzinfo is not None


@pytest.mark.parametrize("given", ["yesterday", "10", "m", "", "10 parsecs"])
def test_anything_else_is_wrong_usage(given: str) -> None:
    with pytest.raises(WrongInputError, match="neither how long ago nor a time") as told:
        moment(given, NOW)
    assert told.value.fix == "as in --since 10m, or --since 2026-11-26T08:00"


def test_the_last_note_before_the_time_counts_and_a_torn_one_does_not() -> None:
    begin = NOW.timestamp()
    notes = f"{begin:.1f} 100\n{begin + 5:.1f} 250\n{begin + 9:.1f} 900\n{begin + 10:.1f} "
    told = [offset(notes, NOW + timedelta(seconds=seconds)) for seconds in (-1, 0, 7, 9, 3600)]
    assert told == [0, 100, 250, 900, 900]
    assert offset("", NOW) == 0
