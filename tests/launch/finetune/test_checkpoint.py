"""A run that was cut off and goes on from its checkpoint gives the losses and weights of one that never stopped, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import FailedError, WrongInputError
from launch import model_card
from launch.agent.report import Report, Reporter
from launch.finetune import loop
from launch.finetune.checkpoint import Checkpoints
from launch.finetune.data import Corpus
from launch.finetune.pipeline import Pipeline
from launch.finetune.strategy import Tally
from launch.recipe import FinetuneRecipe
from launch.shard.stage import Stage
from launch.split import balance
from tests import models
from tests.launch.finetune.test_pipeline import CPU, recipe, uneven_samples
from tests.ranks import run_ranks

SETTINGS = {"base_model": "base", "seed": 3}
STEPS = 8


class CutOff(Reporter):
    """Ends the run when a step is told."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def tell(self, report: Report) -> None:
        if report.event == "step" and report.step == self._at:
            raise KeyboardInterrupt


def train(rank: int, world: int, wanted: FinetuneRecipe, folder: Path, cut_off: int) -> list[float]:
    """Train, cut off at a step (0: never), from the newest checkpoint there is; returns the losses of the steps taken."""
    torch.manual_seed(rank)
    card = model_card.read(Path(wanted.base_model))
    cuts = balance(card.layer_bytes, stages=world, embedding_cost=card.embedding_bytes, head_cost=card.head_cost)
    strategy = Pipeline(Stage.load(Path(wanted.base_model), cuts[rank], dtype=torch.float32, device=CPU), wanted)
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, settings=SETTINGS)
    found = checkpoints.newest()
    if found is not None:
        strategy.load_state(checkpoints.load(found))
    corpus = Corpus(tuple(uneven_samples()), ())
    try:
        tallies = loop.train(
            strategy, wanted, corpus, None, CutOff(cut_off), checkpoints=checkpoints, done=found.step if found else 0
        )
    except KeyboardInterrupt:
        return []
    strategy.save(adapter=folder / "adapter", model=folder / "model", tokenizer=models.tokenizer())
    return [tally.loss for tally in tallies]


@pytest.mark.parametrize(
    ("adapter", "optimizer"),
    [("lora", "adamw_torch"), ("lora", "adamw_8bit"), ("full", "adamw_torch"), ("full", "adafactor")],
)
def test_a_run_cut_off_and_resumed_equals_one_that_never_stopped(adapter: str, optimizer: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"adapter": adapter, "optimizer": optimizer, "max_steps": STEPS, "save_steps": 2}
    if adapter == "lora":
        changes["lora_dropout"] = 0.1  # whose random state must come back too
    wanted = recipe(models.make(tmp_path / "base"), learning_rate=1e-3, **changes)
    whole = run_ranks(train, 2, wanted, tmp_path / "whole", 0)[0]
    assert len(whole) == STEPS
    assert run_ranks(train, 2, wanted, tmp_path / "cut", 5) == [[], []]
    resumed = run_ranks(train, 2, wanted, tmp_path / "cut", 0)[0]
    assert resumed == whole[4:]
    name = "adapter" if adapter == "lora" else "model"
    files = sorted((tmp_path / "whole" / name).glob("*.safetensors"))
    assert files
    for file in files:
        assert file.read_bytes() == (tmp_path / "cut" / name / file.name).read_bytes()


def _saved(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep, settings=SETTINGS)
    for step in steps:
        checkpoints.save(step, {"weight/a": torch.full((100,), float(step))})
    return checkpoints


def test_what_was_saved_is_loaded_with_the_random_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    checkpoints = _saved(tmp_path, 3)
    drawn = torch.rand(4)
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.skipped) == (3, ())
    assert checkpoints.load(found)["weight/a"].tolist() == [3.0] * 100
    assert torch.equal(torch.rand(4), drawn)


def test_only_the_newest_are_kept_and_never_fewer_than_one_complete(tmp_path: Path) -> None:
    _saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    (tmp_path / "checkpoint-4" / "rank0" / "complete").unlink()  # then 3 is the last complete one
    checkpoints = _saved(tmp_path, keep=1)
    checkpoints._prune()
    assert (tmp_path / "checkpoint-3" / "rank0" / "complete").is_file()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda part: (part / "complete").unlink(), "cut off before both ranks"),
        (lambda part: (part / "state.safetensors").write_bytes(b"short"), "is cut short"),
        (shutil.rmtree, "never landed"),
        (lambda part: (part / "part.json").write_text("{"), "never landed"),
    ],
    ids=["no marker", "truncated", "no part", "torn"],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_said_so(
    damage: Any, why: str, tmp_path: Path
) -> None:
    checkpoints = _saved(tmp_path, 2, 4)
    damage(tmp_path / "checkpoint-4" / "rank0")
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 2
    assert len(found.skipped) == 1
    assert "checkpoint-4" in found.skipped[0]
    assert why in found.skipped[0]
    with pytest.raises(WrongInputError, match=why):
        checkpoints.at(tmp_path / "checkpoint-4")
    assert checkpoints.last() == tmp_path / "checkpoint-2"


def half_landed(rank: int, folder: Path) -> tuple[int, tuple[str, ...]]:
    """Two ranks, of which one lost its marker of the newest."""
    checkpoints = _saved(folder, 2, 4)
    if rank == 1:
        (folder / "checkpoint-4" / "rank1" / "complete").unlink()
    found = checkpoints.newest()
    assert found is not None
    return found.step, found.skipped


def test_a_checkpoint_that_only_one_rank_has_whole_is_passed_over_on_both(tmp_path: Path) -> None:
    (first, told), (second, seen) = run_ranks(half_landed, tmp_path)
    assert first == second == 2
    assert "not whole on the other rank" in told[0]
    assert "cut off" in seen[0]


def disk_full(rank: int, folder: Path) -> str:
    """One rank cannot write its part."""
    checkpoints = _saved(folder, 2)
    if rank == 1:
        checkpoints._write_part = _no_space  # type: ignore[method-assign]
    with pytest.raises(FailedError) as failed:
        checkpoints.save(4, {"weight/a": torch.zeros(3)})
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 2
    return failed.value.message


def _no_space(*_args: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_on_one_node_fails_both_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    told = run_ranks(disk_full, tmp_path)
    assert "other rank could not write" in told[0]
    assert "No space left on device" in told[1]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_another_recipes_checkpoint_is_not_taken(tmp_path: Path) -> None:
    _saved(tmp_path, 2)
    other = Checkpoints(tmp_path, keep=2, settings={**SETTINGS, "seed": 4})
    assert other.newest() is None
    with pytest.raises(WrongInputError, match="made with seed 3, not 4"):
        other.at(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("lost", [float("nan"), float("inf"), 40.0], ids=["nan", "infinite", "exploded"])
def test_a_lost_loss_ends_the_run_with_the_last_good_checkpoint_named(lost: float, tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path, 12)
    before = [Tally(2.0, 0.5)] * loop.RECENT
    loop._stop_if_lost(Tally(9.0, 0.1), before, 13, checkpoints)
    with pytest.raises(FailedError, match=r"step 13: .*nothing that could be learned") as failed:
        loop._stop_if_lost(Tally(lost, 0.0), before, 13, checkpoints)
    assert f"last good checkpoint is {tmp_path / 'checkpoint-12'}" in failed.value.fix
