"""Who holds what of a model, what a recipe may not ask of it, and what is refused rather than done otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RefusedError, WrongInputError
from cluster.inventory import Inventory
from launch.model_card import ModelCard
from launch.plan import Plan, RankPlan, UnfitError, nodes_of, plan, refuse_absent
from launch.recipe import FinetuneRecipe, InferenceRecipe, Recipe, parse_dump
from launch.split import Cut

PAIR = Inventory.model_validate(
    {"nodes": ({"name": "left", "transport": "local"}, {"name": "right", "transport": "local"})}
)


def _card(**changes: Any) -> ModelCard:
    card: dict[str, Any] = {
        "folder": Path("/models/small"),
        "model_type": "llama",
        "layers": 8,
        "hidden_size": 64,
        "vocab_size": 264,
        "max_positions": 512,
        "tied": False,
        "layer_bytes": (100,) * 8,
        "embedding_bytes": 250,
        "head_bytes": 260,
        "parameters": 655,
    }
    return ModelCard(**{**card, **changes})


def _finetune(**changes: Any) -> FinetuneRecipe:
    data = {
        "kind": "finetune",
        "name": "tune",
        "base_model": "/models/small",
        "datasets": [{"path": "a.jsonl", "type": "qa"}],
        "sequence_len": 128,
    }
    made = parse_dump({**data, **changes})
    assert isinstance(made, FinetuneRecipe)
    return made


def _inference(**changes: Any) -> InferenceRecipe:
    made = parse_dump(
        {"kind": "inference", "name": "serve", "base_model": "/models/small", "max_model_len": 128, **changes}
    )
    assert isinstance(made, InferenceRecipe)
    return made


@pytest.mark.parametrize("recipe", [_finetune(), _inference()], ids=["finetune", "inference"])
def test_both_nodes_hold_half(recipe: Recipe) -> None:
    assert plan(recipe, _card(), PAIR) == Plan(
        "pipeline",
        (RankPlan(0, "left", Cut(0, 4, 8), 400 + 250), RankPlan(1, "right", Cut(4, 8, 8), 400 + 260)),
    )


def test_all_bytes_are_held_once_where_nothing_is_tied() -> None:
    card = _card(layer_bytes=(10, 20, 30, 40, 50, 60, 70, 80))
    assert sum(rank.weight_bytes for rank in plan(_finetune(), card, PAIR).ranks) == card.total_bytes


def test_a_tied_embedding_is_held_by_both_and_counted_when_cutting() -> None:
    card = _card(tied=True, head_bytes=10)
    ranks = plan(_finetune(), card, PAIR).ranks
    assert [rank.weight_bytes for rank in ranks] == [400 + 250, 400 + 260]
    assert sum(rank.weight_bytes for rank in ranks) == card.total_bytes + card.embedding_bytes
    alone = plan(_finetune(nodes=1), card, PAIR).ranks
    assert [rank.weight_bytes for rank in alone] == [card.total_bytes]


def test_a_large_head_leaves_the_last_rank_fewer_layers() -> None:
    ranks = plan(_finetune(), _card(embedding_bytes=0, head_bytes=400), PAIR).ranks
    assert [str(rank.cut) for rank in ranks] == ["embedding + layers 0-5", "layers 6-7 + head"]


@pytest.mark.parametrize(("nodes", "node"), [(1, "left"), ("left", "left"), ("right", "right")])
def test_one_node_runs_the_model_whole(nodes: int | str, node: str) -> None:
    ranks = plan(_finetune(nodes=nodes), _card(layers=1, layer_bytes=(100,)), PAIR).ranks
    assert ranks == (RankPlan(0, node, Cut(0, 1, 1), 610),)


def test_an_unknown_node_is_answered_with_those_there_are() -> None:
    assert [node.name for node in nodes_of(_finetune(), PAIR)] == ["left", "right"]
    with pytest.raises(UnfitError) as unfit:
        plan(_finetune(nodes="middle"), _card(), PAIR)
    assert (unfit.value.key, unfit.value.message) == ("nodes", "nodes: no node is named 'middle'")
    assert "left, right" in unfit.value.fix


def test_a_model_with_fewer_layers_than_ranks_is_refused_with_a_way_out() -> None:
    with pytest.raises(WrongInputError, match="1 layer, fewer than the 2 ranks") as wrong:
        plan(_finetune(), _card(layers=1, layer_bytes=(100,)), PAIR)
    assert "nodes: 1" in wrong.value.fix


@pytest.mark.parametrize(
    ("recipe", "key"),
    [(_finetune(sequence_len=513), "sequence_len"), (_inference(max_model_len=513), "max_model_len")],
    ids=["finetune", "inference"],
)
def test_a_sequence_longer_than_the_model_allows_blames_its_key(recipe: Recipe, key: str) -> None:
    with pytest.raises(UnfitError) as unfit:
        plan(recipe, _card(), PAIR)
    assert unfit.value.status == 2
    assert unfit.value.key == key
    assert unfit.value.problem == "513 is longer than the 512 positions that small allows"
    assert unfit.value.message == f"{key}: {unfit.value.problem}"
    assert unfit.value.fix == "set it to at most 512"
    assert plan(recipe, _card(max_positions=513), PAIR).ranks
    assert plan(recipe, _card(max_positions=None), PAIR).ranks


@pytest.mark.parametrize(
    "recipe",
    [
        _finetune(),
        _finetune(adapter="full", strategy="pipeline", nodes=1, val_set_size=0.1, eval_steps=5),
        _inference(),
        _inference(adapter_path="/adapters/a"),
    ],
)
def test_what_this_version_does_is_not_refused(recipe: Recipe) -> None:
    refuse_absent(recipe)


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (_finetune(strategy="fsdp2"), "`strategy: fsdp2`"),
        (_finetune(adapter="qlora"), "`adapter: qlora`"),
        (_finetune(optimizer="adafactor"), "`optimizer: adafactor`"),
        (_finetune(sample_packing=True), "`sample_packing`"),
        (_finetune(resume_from_checkpoint="auto"), "`resume_from_checkpoint`"),
        (_finetune(save_steps=10), "`save_steps`"),
        (_finetune(output_dir="/out"), "`output_dir`"),
        (_finetune(datasets=[{"path": "a.jsonl", "type": "qa", "split": "test"}]), "`datasets[].split`"),
        (_inference(quantization="nf4"), "`quantization`"),
        (_inference(adapter_from="tune-1a2b"), "`adapter_from`"),
        (parse_dump({"kind": "command", "name": "run", "command": ["date"]}), "`kind: command`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_this_version_lacks_is_refused_by_name(recipe: Recipe, named: str) -> None:
    with pytest.raises(RefusedError) as refused:
        refuse_absent(recipe)
    assert named in refused.value.message
    assert refused.value.message.startswith(f"{recipe.name}: ")
    assert refused.value.fix
