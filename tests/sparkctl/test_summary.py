"""What a fine-tune came to is told from the metrics that went by, whoever wrote them."""

from __future__ import annotations

from typing import Any

import pytest

from sparkctl.show import details
from sparkctl.summary import Summary, duration


def entry(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "total_steps": 10, "epoch": step / 5, "loss": 5.0 - step / 4, "grad_norm": 1.25, "learning_rate": 2e-4,
        "token_accuracy": step / 20, "tokens_per_s": 1000.0 * step, **more,
    }  # fmt: skip


def test_first_and_last_losses_the_last_evaluation_and_the_median_speed_are_told() -> None:
    entries = [
        entry(1), {"step": 1, "eval_loss": 9.0, "eval_token_accuracy": 0.0}, entry(2),
        entry(10, seconds=125.4, busy=[0.91, 0.88], memory=[3 << 30, 2 << 30]),
        {"step": 10, "eval_loss": 2.75, "eval_token_accuracy": 0.5},
    ]  # fmt: skip
    summary = Summary.of(entries)
    assert summary is not None
    assert summary.rows() == [
        ("steps", "10 of 10, 2 epochs"),
        ("loss", "4.7500 -> 2.5000, token accuracy 50.0%"),
        ("evaluation", "loss 2.7500, token accuracy 50.0%"),
        ("speed", "2,000 tokens/s"),
        ("time", "2:05"),
        ("busy", "91% + 88%"),
        ("memory", "3 GiB + 2 GiB"),
    ]
    assert summary.lines()[0] == "steps        10 of 10, 2 epochs"


def test_what_nobody_has_told_is_left_out() -> None:
    summary = Summary.of([entry(10)])
    assert summary is not None
    assert [name for name, _ in summary.rows()] == ["steps", "loss", "speed"]
    assert Summary.of([{"step": 1, "eval_loss": 1.0, "eval_token_accuracy": 0.0}]) is None
    assert details(entry(5)) == "  epoch 1.00  grad norm 1.25  rate 2.00e-04"


@pytest.mark.parametrize(("seconds", "told"), [(3.44, "3.4 s"), (60, "1:00"), (3599.6, "1:00:00"), (3723, "1:02:03")])
def test_durations_read_as_clocks_show_them(seconds: float, told: str) -> None:
    assert duration(seconds) == told
