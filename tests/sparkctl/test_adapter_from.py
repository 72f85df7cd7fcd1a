"""`adapter_from`: a recipe takes its adapter from the job of a fine-tune, or is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launch import start
from launch.job import JobState
from launch.recipe import load
from launch.spec import JobSpec, RankSpec
from sparkctl.cli import main
from tests.commandline import CommandLine

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """A home with jobs as fine-tunes leave them; commands of this process go to it."""
    made = CommandLine(tmp_path.resolve()).equip()
    monkeypatch.chdir(made.folder)
    for name in ("SPARKCTL_HOME", "SPARKCTL_INVENTORY"):
        monkeypatch.setenv(name, made.environment[name])
    shutil.copytree(made.folder / "model", made.folder / "other")
    leave_job(made, "tune-full-aaaa", "succeeded", adapter="full")
    leave_job(made, "tune-broken-bbbb", "failed")
    leave_job(made, "tune-done-cccc", "succeeded")
    return made


def leave_job(commands: CommandLine, name: str, state: Any, **changes: Any) -> None:
    """A job's folder on the embedded pair, with an adapter for each of the model's four layers."""
    folder = commands.home / "jobs" / name
    (folder / "adapter").mkdir(parents=True)
    spec = JobSpec(
        id=name,
        created="2026-01-01T00:00:00+00:00",
        version="0",
        recipe=load(commands.folder / "tiny.yaml").model_copy(update=changes).model_dump(mode="json"),
        layers=4,
        ranks=(RankSpec(rank=0, node="left", start=0, end=2), RankSpec(rank=1, node="right", start=2, end=4)),
        master_addr="127.0.0.1",
        embedded=True,
    )
    (folder / "spec.json").write_text(spec.model_dump_json())
    (folder / "state.json").write_text(JobState(state=state).model_dump_json())
    of_layer = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    save_file({of_layer.format(i): torch.zeros(4, 64) for i in range(4)}, folder / "adapter/adapter_model.safetensors")


def write(job: str | None, **changes: Any) -> Path:
    """A recipe that takes its adapter from `job`."""
    recipe = {
        "kind": "inference",
        "name": "base",
        "base_model": "./model",
        "adapter_from": job,
        "max_model_len": 64,
        "port": 0,
    }
    path = Path("serve.yaml")
    path.write_text(json.dumps(recipe | changes))
    return path


def status(*arguments: str) -> object:
    """The exit status of a command of this process."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


def needed(capsys: pytest.CaptureFixture[str]) -> int:
    """What the plan of the recipe says that its ranks need."""
    assert status("plan", "serve.yaml", "--json") == 0
    return sum(rank["needed"] for rank in json.loads(capsys.readouterr().out)["ranks"])


def test_a_plan_counts_the_adapter_of_the_job(commands: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    write(None)
    without = needed(capsys)
    for name in ("tune-done-cccc", "cccc"):
        write(name)
        assert needed(capsys) == without + 4 * (4 * 4 * 64)  # in 32 bits


def test_each_rank_reads_the_adapter_where_it_lies_and_clients_know_it_by_the_job(commands: CommandLine) -> None:
    from cluster import inventory

    prepared = start.prepare_file(write("tune-done-cccc"), (), inventory.load(commands.folder / "pair.yaml"))
    adapter = str(commands.home / "jobs" / "tune-done-cccc" / "adapter")
    assert prepared.adapters == {"tune-done-cccc": adapter}
    rank = RankSpec(rank=0, node="left", start=0, end=4, adapters=dict(prepared.adapters))
    recipe = prepared.recipe.model_dump(mode="json")
    spec = JobSpec(
        id="s", created="", version="0", recipe=recipe, layers=4, ranks=(rank,), master_addr="127.0.0.1", embedded=True
    )
    read = spec.recipe_at(0)
    assert (read["adapter_path"], read["adapter_from"]) == (adapter, None)

    from launch.inference.serve import model_names

    assert isinstance(prepared.recipe, start.InferenceRecipe)
    assert model_names(prepared.recipe) == {"tune-done-cccc": "adapter", "base": None}


def test_a_job_without_a_fitting_adapter_is_refused_by_name(
    commands: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    here = commands.folder
    for job, base, expected, told in (
        ("tune-none-dddd", "./model", 2, "tune-none-dddd: no such job"),
        ("tune-full-aaaa", "./model", 3, "job tune-full-aaaa has made no adapter: it has trained the whole model"),
        ("tune-broken-bbbb", "./model", 3, "job tune-broken-bbbb is failed: it has no result to ask"),
        ("cccc", "./other", 3, f"job tune-done-cccc has trained an adapter of {here}/model, not of {here}/other"),
    ):
        write(job, base_model=base)
        assert status("run", "serve.yaml") == expected
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"error: {told}"), err
        assert len(err.splitlines()) == 2
    assert len(commands.jobs()) == 3  # nothing was begun


def test_an_exported_script_cannot_name_a_job_of_the_pair(
    commands: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    write("tune-done-cccc")
    assert status("export", "serve.yaml", "--to", "torchrun") == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: base: adapter_from names a job of this pair")
