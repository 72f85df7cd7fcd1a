"""The ready recipes that fine-tune large models fit on two DGX Sparks, and say in a comment what their plan says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch import plan, recipe
from launch.plan import refuse_absent
from launch.recipe import FinetuneRecipe
from launch.speed import TrainingSpeed
from sparkctl.recipes import folder
from tests.launch.plans import SPARKS, public

GIB = 2**30
CARDS = {
    "finetune-r1-distill-32b-qlora": "deepseek-r1-distill-qwen-32b",
    "finetune-llama-3.3-70b-qlora": "llama-3.1-70b",
    "finetune-llama-3.1-405b-qlora": "llama-3.1-405b",
    "finetune-qwen3-235b-qlora": "qwen3-235b-a22b",
    "finetune-llama-3.1-8b-lora-ddp": "llama-3.1-8b",
    "finetune-llama-3.1-8b-full-fsdp2": "llama-3.1-8b",
}
VERDICT = re.compile(
    r"# Plan for two DGX Sparks: fits, ([\d.]+) and ([\d.]+) of ([\d.]+) GiB; ([\d.]+) s a step, ([\d.]+) tokens/s"
)


def verdict(name: str) -> str:
    """The comment as it should be."""
    wanted = recipe.load(folder() / f"{name}.yaml")
    assert isinstance(wanted, FinetuneRecipe)
    refuse_absent(wanted)
    made = plan.plan(wanted, public(CARDS[name]), SPARKS)
    assert made.fits
    assert wanted.strategy == made.strategy
    assert isinstance(made.speed, TrainingSpeed)
    first, second = (rank.memory.total / GIB for rank in made.ranks)
    return (
        f"# Plan for two DGX Sparks: fits, {first:.1f} and {second:.1f} of {made.ranks[0].box.usable / GIB:.1f} GiB; "
        f"{made.speed.step:.1f} s a step, {made.speed.tokens:.0f} tokens/s"
    )


def test_every_large_recipe_to_fine_tune_is_planned_here() -> None:
    assert {path.stem for path in folder().glob("finetune-*.yaml")} == {*CARDS, "finetune-tiny"}


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_fits_and_its_comment_is_its_plans_verdict(name: str) -> None:
    real = VERDICT.fullmatch(verdict(name))
    written = VERDICT.fullmatch(Path(folder() / f"{name}.yaml").read_text().splitlines()[1])
    assert written is not None, f"its second line should be\n{verdict(name)}"
    assert real is not None
    told, true = ([float(figure) for figure in match.groups()] for match in (written, real))
    assert told == pytest.approx(true, rel=0.05, abs=0.1), f"its second line should be\n{verdict(name)}"
