"""The ready recipes for large models say in a comment what their plan says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch import plan, recipe
from launch.plan import Plan
from launch.recipe import InferenceRecipe
from launch.speed import ServingSpeed
from sparkctl.recipes import folder
from tests.launch.plans import SPARKS, public

GIB = 2**30
CARDS = {
    "serve-llama-3.1-405b-nf4": "llama-3.1-405b",
    "serve-qwen3-235b-nf4": "qwen3-235b-a22b",
    "serve-gpt-oss-120b-nf4": "gpt-oss-120b",
    "serve-glm-4.5-355b-nf4": "glm-4.5-355b-a32b",
    "serve-adapter": "deepseek-r1-distill-qwen-32b",
}
VERDICT = re.compile(
    r"# Plan for two DGX Sparks: (fits|does not fit), ([\d.]+) and ([\d.]+) of ([\d.]+) GiB; "
    r"([\d.]+) tokens/s for one request, ([\d.]+) for (\d+) together"
)


def planned(name: str) -> tuple[InferenceRecipe, Plan]:
    """A ready recipe, and its plan for two DGX Sparks."""
    wanted = recipe.load(folder() / f"{name}.yaml")
    assert isinstance(wanted, InferenceRecipe)
    return wanted, plan.plan(wanted, public(CARDS[name]), SPARKS)


def verdict(name: str) -> str:
    """The comment as it should be."""
    wanted, made = planned(name)
    assert isinstance(made.speed, ServingSpeed)
    first, second = (rank.memory.total / GIB for rank in made.ranks)
    return (
        f"# Plan for two DGX Sparks: {'fits' if made.fits else 'does not fit'}, {first:.1f} and {second:.1f} of "
        f"{made.ranks[0].box.usable / GIB:.1f} GiB; {made.speed.one:.1f} tokens/s for one request, "
        f"{made.speed.full:.0f} for {wanted.max_num_seqs} together"
    )


def test_every_large_recipe_to_serve_is_planned_here() -> None:
    assert {path.stem for path in folder().glob("serve-*.yaml")} == {*CARDS, "serve-tiny"}


@pytest.mark.parametrize("name", CARDS)
def test_a_recipes_comment_is_its_plans_verdict(name: str) -> None:
    lines = Path(folder() / f"{name}.yaml").read_text().splitlines()
    written, real = VERDICT.fullmatch(lines[1]), VERDICT.fullmatch(verdict(name))
    assert written is not None, f"its second line should be\n{verdict(name)}"
    assert real is not None
    assert real[1] == "fits"
    assert (written[1], written[7]) == (real[1], real[7])
    told, true = ([float(match[group]) for group in range(2, 7)] for match in (written, real))
    assert told == pytest.approx(true, rel=0.05, abs=0.1), f"its second line should be\n{verdict(name)}"
