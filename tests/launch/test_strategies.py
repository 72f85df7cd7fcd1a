"""`strategy: auto`: what the plan picks, and what it says of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launch.plan import plan
from launch.strategies import ALL, Option, choose
from tests.launch.plans import SPARKS, cpus, public, tune

ROOM = {name: Option(name, "", -1, step) for name, step in zip(ALL, (1.0, 2.0, 3.0, 3.0), strict=True)}


@pytest.mark.parametrize(
    ("changes", "quantized", "chosen", "why"),
    [
        ({}, False, "ddp", "fits one node"),
        ({"ddp": {"lacking": 1}}, True, "pipeline", "quantised weights stay"),
        ({"ddp": {"lacking": 1}}, False, "pipeline", "more than the pipeline's bubble"),
        ({"ddp": {"lacking": 1}, "fsdp2": {"step": 1.5}}, False, "fsdp2", "less than the pipeline's bubble"),
        ({"ddp": {"lacking": 1}, "fsdp2": {"step": 1.5}}, True, "pipeline", "quantised weights stay"),
        ({"ddp": {"absent": "it"}, "pipeline": {"lacking": 1}}, False, "fsdp2", "moves the least"),
        ({"ddp": {"lacking": 1}, "fsdp2": {"absent": "it"}}, False, "pipeline", "moves the least"),
        (
            {"ddp": {"lacking": 1}, "pipeline": {"lacking": 1}, "fsdp2": {"absent": "it"}},
            False,
            "zero3",
            "nothing else fits",
        ),
        ({name: {"lacking": 9 - at} for at, name in enumerate(ALL)}, False, "zero3", "lacks the least"),
    ],
)
def test_the_rule(changes: dict[str, dict[str, Any]], quantized: bool, chosen: str, why: str) -> None:
    options = [replace(option, **changes.get(name, {})) for name, option in ROOM.items()]
    choice = choose(options, shared=False, quantized=quantized)
    assert choice.strategy == chosen
    assert why in choice.reason
    assert choice.options == tuple(options)


def test_two_ranks_of_one_machine_run_the_pipeline() -> None:
    choice = choose(list(ROOM.values()), shared=True, quantized=False)
    assert (choice.strategy, "share one machine" in choice.reason) == ("pipeline", True)


def test_small_models_learn_on_both_nodes_at_once_and_large_ones_in_halves() -> None:
    small = plan(tune(adapter="lora", strategy="auto"), public("llama-3.1-8b"), SPARKS)
    assert small.strategy == "ddp"
    assert small.fits
    large = plan(
        tune(adapter="qlora", strategy="auto", micro_batch_size=1, sequence_len=512), public("llama-3.1-405b"), SPARKS
    )
    assert large.strategy == "pipeline"
    assert large.choice is not None
    steps = {option.strategy: option.step for option in large.choice.options}
    assert all(step is not None and step > 0 for step in steps.values())
    assert large.speed is not None
    assert steps["pipeline"] == large.speed.step  # type: ignore[union-attr]


def test_nothing_is_chosen_where_there_is_one_node_or_the_recipe_says() -> None:
    card = public("llama-3.1-8b")
    assert plan(tune(adapter="lora", strategy="auto"), card, SPARKS[:1]).choice is None
    assert plan(tune(adapter="lora", strategy="fsdp2"), card, SPARKS).choice is None


def test_the_embedded_pair_rehearses_the_pipeline() -> None:
    made = plan(
        tune(adapter="lora", strategy="auto"), public("llama-3.1-8b"), [replace(box, ranks=2) for box in cpus()]
    )
    assert made.choice is not None
    assert (made.strategy, {option.step for option in made.choice.options}) == ("pipeline", {None})
