"""Who holds what of a model and whether it fits; what a recipe may not ask of it, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import RefusedError, WrongInputError
from cluster.inventory import EMBEDDED, Inventory, Node
from cluster.readings.box import Memory
from launch import box
from launch.box import GIB, SPARK_MEMORY, Box
from launch.kv_cache import LayerCache
from launch.model_card import ModelCard, Part
from launch.plan import UnfitError, nodes_of, plan, refuse_absent, refuse_unfit
from launch.precision import Kind, Weight
from launch.recipe import Recipe
from launch.speed import TrainingSpeed
from launch.workload import Training
from tests.launch.plans import NODES, SPARKS, cpus, public, serve, tune

MIB = 2**20


def _card(layers: int = 8, *, embedding: int = MIB, head: int = MIB, tied: bool = False, **changes: Any) -> ModelCard:
    """Layers of one square matrix of 2**20 numbers each; sizes are numbers."""
    matrix = Weight("mlp.up_proj.weight", Kind.LINEAR, MIB, 2 * MIB, rows=1024, columns=1024)
    ends = [Part((Weight("e", Kind.OTHER, size, 2 * size),)) for size in (embedding, head)]
    card: dict[str, Any] = {
        "source": "/models/small",
        "model_type": "llama",
        "hidden_size": 1024,
        "vocab_size": max(1, head // 1024),
        "max_positions": 4096,
        "tied": tied,
        "stack": (Part((matrix,), LayerCache(64)),) * layers,
        "embedding": ends[0],
        "head": ends[1],
        "heads": 8,
    }
    return ModelCard(**{**card, **changes})


@pytest.mark.parametrize("recipe", [tune(adapter="lora"), serve(quantization=None)], ids=["finetune", "inference"])
def test_both_nodes_hold_half(recipe: Any) -> None:
    made = plan(recipe, _card(), SPARKS)
    assert [(rank.rank, rank.node, str(rank.cut)) for rank in made.ranks] == [
        (0, "spark-a", "embedding + layers 0-3"),
        (1, "spark-b", "layers 4-7 + head"),
    ]
    assert [rank.weight_bytes for rank in made.ranks] == [2 * 5 * MIB, 2 * 5 * MIB]
    assert (made.strategy, made.fits) == ("pipeline", True)


def test_a_tied_embedding_is_held_by_both() -> None:
    card = _card(tied=True, head=1024, vocab_size=1024)
    ranks = plan(tune(adapter="lora"), card, SPARKS).ranks
    assert sum(rank.weight_bytes for rank in ranks) == card.total_bytes + card.embedding_bytes
    assert [rank.weight_bytes for rank in plan(tune(adapter="lora"), card, SPARKS[:1]).ranks] == [card.total_bytes]


def test_a_large_head_leaves_the_last_rank_fewer_layers_and_an_embedding_does_not() -> None:
    ranks = plan(serve(quantization=None), _card(head=4 * MIB), cpus()).ranks
    assert [str(rank.cut) for rank in ranks] == ["embedding + layers 0-5", "layers 6-7 + head"]
    ranks = plan(serve(quantization=None), _card(embedding=4 * MIB), cpus()).ranks
    assert [rank.cut.end for rank in ranks] == [4, 8]


def test_where_memory_is_scarce_it_is_what_is_halved() -> None:
    """The head takes as long as several layers in 4 bits; but a node that is full to the brim has no room for that."""
    card = public("llama-3.1-405b")
    assert [rank.cut.end for rank in plan(serve(), card, SPARKS).ranks] == [63, 126]
    roomy = box.asked(NODES, 200)
    assert [rank.cut.end for rank in plan(serve(), card, roomy).ranks] == [64, 126]


def test_the_larger_box_takes_more_layers_where_the_smaller_cannot() -> None:
    card = public("qwen3-235b-a22b")
    boxes = (*box.asked(NODES[:1], 64), *box.asked(NODES[1:], 121.7))
    made = plan(serve(), card, boxes)
    assert made.fits
    first, second = (rank.cut.end - rank.cut.start for rank in made.ranks)
    assert 1.4 * first < second
    assert not plan(serve(), card, box.asked(NODES, 64)).fits


def test_a_model_with_fewer_layers_than_ranks_is_refused_with_a_way_out() -> None:
    with pytest.raises(WrongInputError, match="1 layer, fewer than the 2 ranks") as wrong:
        plan(tune(adapter="lora"), _card(1), SPARKS)
    assert "nodes: 1" in wrong.value.fix


@pytest.mark.parametrize(
    ("recipe", "key"),
    [(tune(sequence_len=4097), "sequence_len"), (serve(max_model_len=4097), "max_model_len")],
    ids=["finetune", "inference"],
)
def test_a_sequence_longer_than_the_model_allows_blames_its_key(recipe: Any, key: str) -> None:
    with pytest.raises(UnfitError) as unfit:
        plan(recipe, _card(), SPARKS)
    assert unfit.value.status == 2
    assert unfit.value.key == key
    assert unfit.value.problem == "4097 is longer than the 4096 positions that small allows"
    assert unfit.value.message == f"{key}: {unfit.value.problem}"
    assert unfit.value.fix == "set it to at most 4096"
    assert plan(recipe, _card(max_positions=4097), SPARKS).ranks
    assert plan(recipe, _card(max_positions=None), SPARKS).ranks


# ---- what would fit


def _values(made: Any) -> list[dict[str, Any]]:
    return [{change.key: change.value for change in way.changes} for way in made.ways]


def test_what_fits_is_told_how_far_it_could_grow() -> None:
    card = public("llama-3.1-70b")
    made = plan(serve(quantization=None, max_model_len=8192, max_num_seqs=4), card, SPARKS)
    length, sequences = _values(made)
    for recipe, fits in (
        (serve(quantization=None, max_num_seqs=4, **length), True),
        (serve(quantization=None, max_num_seqs=4, max_model_len=length["max_model_len"] + 64), False),
        (serve(quantization=None, max_model_len=8192, **sequences), True),
        (serve(quantization=None, max_model_len=8192, max_num_seqs=sequences["max_num_seqs"] + 1), False),
    ):
        assert plan(recipe, card, SPARKS).fits == fits
    assert _values(plan(serve(), public("llama-3.1-8b"), SPARKS))[0] == {"max_model_len": 131072}  # all that it allows


@pytest.mark.parametrize(
    ("name", "recipe", "keys"),
    [
        ("qwen3-235b-a22b", serve(quantization=None), [{"quantization"}]),
        ("llama-3.1-405b", serve(max_model_len=8192, max_num_seqs=4), [{"max_model_len"}, {"max_num_seqs"}]),
        (
            "llama-3.1-405b",
            serve(quantization=None, max_model_len=8192, max_num_seqs=4),
            [{"quantization", "max_model_len"}, {"quantization", "max_num_seqs"}],
        ),
        ("llama-3.1-70b", tune(adapter="full"), [{"adapter"}, {"adapter"}]),  # lora or qlora
        ("llama-3.1-405b", tune(adapter="full", lora_r=4), [{"adapter"}]),  # qlora alone
        ("llama-3.1-405b", tune(lora_r=8, sequence_len=4096), [{"sequence_len"}]),
        ("llama-3.1-70b", tune(adapter="lora", sequence_len=16384, gradient_checkpointing=False), None),
        ("deepseek-v3", serve(), []),
        ("deepseek-v3", serve(quantization=None), []),
    ],
)
def test_what_does_not_fit_is_told_what_would(name: str, recipe: Any, keys: list[set[str]] | None) -> None:
    made = plan(recipe, public(name), SPARKS)
    assert not made.fits
    if keys is None:
        assert {"gradient_checkpointing": True} in _values(made)
    else:
        assert [set(way) for way in _values(made)] == keys
    for way in _values(made):
        assert plan(recipe.model_copy(update=way), public(name), SPARKS).fits


def test_a_plan_that_does_not_fit_refuses_to_start_with_the_node_and_a_way_out() -> None:
    recipe = serve(quantization=None)
    with pytest.raises(RefusedError) as refused:
        refuse_unfit(recipe, plan(recipe, public("qwen3-235b-a22b"), SPARKS))
    assert refused.value.status == 3
    assert refused.value.message == (
        "serve: does not fit: rank 1 needs 222.2 GiB on spark-b, where 109.7 GiB can be used"
    )
    assert refused.value.fix == "set `quantization: nf4`"
    refuse_unfit(serve(), plan(serve(), public("qwen3-235b-a22b"), SPARKS))
    busy = tuple(replace(spark, available=20 * GIB) for spark in SPARKS)
    with pytest.raises(RefusedError, match=r"where 14\.0 GiB can be used now"):
        refuse_unfit(serve(), plan(serve(), public("qwen3-235b-a22b"), busy))


def test_every_assumption_is_told() -> None:
    told = plan(serve(), public("qwen3-235b-a22b"), SPARKS).assumptions
    assert told[0] == "each node: a DGX Spark, 121.7 GiB less 6 GiB for the system and 6 GiB of guard"
    assert told[1] == "sizes: from config.json, the weights are not there"
    assert told[2] == "weights: linear layers and experts in NF4 (4.13 bits), all else in 16 bits"
    assert told[3] == "speeds: caches half full, tokens spread evenly over the experts"
    assert set(box.SPARK.sources) < set(told)
    expanded = plan(serve(quantization=None), public("gpt-oss-120b"), SPARKS).assumptions
    assert "weights: 16 bits, expanded from MXFP4" in expanded
    kept = plan(serve(quantization=None), public("minimax-m2"), SPARKS).assumptions
    assert "weights: as the checkpoint has them, FP8, all else in 16 bits" in kept
    alone = plan(tune(adapter="lora"), _card(), cpus()).assumptions
    assert "weights: 32 bits" in alone
    assert not any(line.startswith("speeds") for line in alone)


def test_the_strategy_is_the_recipes() -> None:
    card = public("llama-3.1-8b")
    for name in ("pipeline", "fsdp2", "zero3", "ddp"):
        made = plan(tune(adapter="lora", strategy=name), card, SPARKS)
        assert (made.strategy, made.choice) == (name, None)
        assert isinstance(made.speed, TrainingSpeed)
        assert isinstance(made.work, Training)
    assert (
        plan(tune(adapter="lora", strategy="ddp"), card, SPARKS[:1]).strategy == "pipeline"
    )  # alone there is nobody to share with


# ---- boxes


def test_a_spark_keeps_twelve_of_its_gib_back() -> None:
    spark = SPARKS[0]
    assert (spark.total, spark.usable) == (SPARK_MEMORY, SPARK_MEMORY - 12 * GIB)
    assert round(spark.total / GIB, 1) == 121.7


def test_what_runs_there_already_cannot_be_used() -> None:
    busy = replace(SPARKS[0], available=50 * GIB)
    assert (busy.usable, busy.is_busy) == (44 * GIB, True)
    idle = replace(SPARKS[0], available=SPARK_MEMORY - GIB)
    assert (idle.usable, idle.is_busy) == (SPARK_MEMORY - 12 * GIB, False)
    assert replace(SPARKS[0], available=GIB).usable == 0


def test_a_small_box_keeps_less_back() -> None:
    assert Box("tiny", 3 * GIB, None, False, None, "").usable == 3 * GIB - 2 * (3 * GIB // 16)


def test_two_ranks_on_one_machine_share_it() -> None:
    memory = Memory(total=32 * GIB, available=20 * GIB, swap_total=0, swap_free=0, huge_total=0, huge_free=0, cma=None)
    known = {node.name: memory for node in EMBEDDED.nodes}
    left, right = box.of(EMBEDDED.nodes, known, embedded=True, has_gpu=True)
    assert left.usable == right.usable == 9 * GIB
    assert (left.cuda, left.speeds) == (False, None)  # two ranks cannot have one GPU
    (alone,) = box.of(EMBEDDED.nodes[:1], known, embedded=True, has_gpu=True)
    assert (alone.usable, alone.cuda) == (18 * GIB, True)


def test_a_node_of_which_facts_are_known_is_taken_at_its_word() -> None:
    memory = Memory(
        total=119 * GIB, available=100 * GIB, swap_total=0, swap_free=0, huge_total=0, huge_free=0, cma=None
    )
    known, unknown = box.of(NODES, {"spark-a": memory})
    assert (known.total, known.available) == (119 * GIB, 100 * GIB)
    assert (unknown.total, unknown.available, unknown.about) == (SPARK_MEMORY, None, "a DGX Spark")


def test_this_machine_tells_its_memory() -> None:
    memory = box.this_memory()
    assert memory is not None
    assert 0 < memory.available <= memory.total


# ---- nodes, and what this version lacks

PAIR = Inventory(nodes=(Node(name="left", transport="local"), Node(name="right", transport="local")))


@pytest.mark.parametrize(
    ("nodes", "names"), [(2, ["left", "right"]), (1, ["left"]), ("left", ["left"]), ("right", ["right"])]
)
def test_a_recipe_runs_on_the_nodes_that_it_names(nodes: int | str, names: list[str]) -> None:
    assert [node.name for node in nodes_of(tune(nodes=nodes), PAIR)] == names


def test_an_unknown_node_is_answered_with_those_there_are() -> None:
    with pytest.raises(UnfitError) as unfit:
        nodes_of(tune(nodes="middle"), PAIR)
    assert (unfit.value.key, unfit.value.message) == ("nodes", "nodes: no node is named 'middle'")
    assert "left, right" in unfit.value.fix


@pytest.mark.parametrize(
    "recipe",
    [
        tune(adapter="lora"),
        tune(adapter="qlora", strategy="ddp"),
        tune(adapter="lora", strategy="fsdp2", sample_packing=True),
        tune(adapter="full", strategy="pipeline", nodes=1, val_set_size=0.1, eval_steps=5),
        serve(quantization=None),
        serve(quantization=None, adapter_path="/adapters/a"),
        serve(quantization=None, adapter_from="tune-1a2b"),
    ],
)
def test_what_this_version_does_is_not_refused(recipe: Recipe) -> None:
    refuse_absent(recipe)


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (tune(adapter="lora", strategy="zero3"), "`strategy: zero3`"),
        (tune(adapter="qlora", strategy="fsdp2"), "`adapter: qlora` with `strategy: fsdp2`"),
        (tune(adapter="lora", datasets=[{"path": "a.jsonl", "type": "qa", "split": "test"}]), "`datasets[].split`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_this_version_lacks_is_refused_by_name(recipe: Recipe, named: str) -> None:
    with pytest.raises(RefusedError) as refused:
        refuse_absent(recipe)
    assert named in refused.value.message
    assert refused.value.message.startswith(f"{recipe.name}: ")
    assert refused.value.fix
