"""Predictions follow from bandwidths as their formulas say, and come out near what others have measured on Sparks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launch import box, plan, speed
from launch.box import SPARK, Speeds
from launch.plan import Plan
from launch.precision import Precision
from launch.speed import Clock, ServingSpeed, TrainingSpeed
from launch.split import Cut, whole
from launch.workload import Serving, Training
from tests.launch.plans import NODES, SPARKS, cpus, public, serve, tune

# A machine on which one thing costs something.
FREE = Speeds(memory=1e30, memory_share=1, flops=1e30, flops_share=1, link=1e30, hop=0, disk=1e30, layer=0, sources=())
SIXTEEN = Precision(None, 2, 2)
LLAMA = public("llama-3.1-8b")


def _clock(precision: Precision = SIXTEEN, name: str = "llama-3.1-8b", **speeds: float) -> Clock:
    return Clock(public(name), precision, replace(FREE, **speeds))


def _serving(clock: Clock, cuts: tuple[Cut, ...], **work: int) -> ServingSpeed:
    wanted = Serving(**{"sequences": 1, "context": 2, "chunk": 256, **work})
    return speed.serving([clock] * len(cuts), cuts, wanted)


HALVES = (Cut(0, 16, 32), Cut(16, 32, 32))


def test_one_sequence_reads_every_weight_once_a_token() -> None:
    read = sum(LLAMA.layer_bytes) + LLAMA.head_bytes - 2 * 4096  # the final norm is not counted
    cache = 32 * 2 * 8 * 128 * 2  # one token of it
    for cuts in (HALVES, (whole(32),)):
        one = _serving(_clock(memory=1e9), cuts).one
        assert one == pytest.approx(1e9 / (read + cache), rel=1e-6)


def test_two_groups_keep_both_stages_busy() -> None:
    alone = _serving(_clock(memory=1e9), HALVES)
    two = _serving(_clock(memory=1e9), HALVES, sequences=2)
    slowest = sum(LLAMA.layer_bytes[16:]) + LLAMA.head_bytes
    assert two.full == pytest.approx(1e9 / slowest, rel=1e-3)
    assert 1.8 < two.full / alone.one < 2
    assert _serving(_clock(memory=1e9), (whole(32),), sequences=2).full == pytest.approx(alone.one, rel=1e-3)


def test_messages_count_where_they_are_waited_for() -> None:
    one = _serving(_clock(hop=0.25), HALVES).one
    assert one == pytest.approx(2)  # there and back
    assert _serving(_clock(hop=0.25), (whole(32),)).one > 1e6
    hidden = _serving(_clock(link=4096 * 2.0), HALVES, chunk=10)
    assert hidden.prefill == pytest.approx(1)


def test_kernels_take_their_time_to_start() -> None:
    assert _serving(_clock(layer=0.01), HALVES).one == pytest.approx(1 / 0.32)


def test_prefill_is_bound_by_operations_of_the_slowest_stage() -> None:
    prefill = _serving(_clock(flops=1e12), HALVES, context=2).prefill
    norms = 2 * 4096
    per_token = 2 * 16 * (LLAMA.stack[0].parameters - norms) + 16 * 4 * 4096
    assert prefill == pytest.approx(1e12 / per_token, rel=0.01)


def test_of_a_mixture_as_much_is_read_as_is_hit() -> None:
    clock = _clock(name="qwen3-235b-a22b", memory=1e9)
    part = clock.card.stack[0]
    experts = next(weight.parameters * 2 for weight in part.weights if weight.name == "experts")
    rest = part.stored - experts
    for tokens, hit in ((1, 8 / 128), (2, 1 - (120 / 128) ** 2), (2000, 1.0)):
        assert clock.layer(part, tokens) == pytest.approx((rest + hit * experts) / 1e9, rel=1e-6)


def test_nf4_is_multiplied_as_it_is_for_few_tokens_and_expanded_for_many() -> None:
    clock = _clock(Precision("nf4", 2, 2), memory=1e9)
    part = LLAMA.stack[0]
    few, many = clock.layer(part, 256), clock.layer(part, 257)
    linear = sum(weight.parameters for weight in part.weights if weight.rows)
    assert few == pytest.approx(linear * 4.127 / 8 / 1e9, rel=0.001)
    assert many - few == pytest.approx(4 * linear / 1e9)


def _training(**changes: Any) -> Training:
    made = plan.plan(tune(**changes), LLAMA, SPARKS).work
    assert isinstance(made, Training)
    return made


def test_the_bubble_of_a_pipeline_shrinks_with_micro_batches() -> None:
    clock = _clock(flops=1e12)
    few, many = (
        speed.pipeline([clock] * 2, HALVES, _training(adapter="lora", gradient_accumulation_steps=count), 0)
        for count in (2, 32)
    )
    assert many.tokens / few.tokens == pytest.approx((32 / 33) / (2 / 3))
    assert many.step / few.step == pytest.approx(33 / 3)


def test_passes_that_a_micro_batch_takes() -> None:
    def step(**changes: Any) -> float:
        return speed.pipeline([_clock(flops=1e12)], (whole(32),), _training(**changes), 0).step

    frozen = step(adapter="lora", gradient_checkpointing=False)
    again, all_of_it = step(adapter="lora"), step(adapter="full", gradient_checkpointing=False)
    # The head's backward pass is the same throughout.
    assert again / frozen == pytest.approx(3 / 2, rel=0.05)
    assert all_of_it / frozen == pytest.approx(3 / 2, rel=0.05)


def test_gathering_weights_over_the_link_is_what_sharding_costs() -> None:
    work = _training(adapter="full", gradient_accumulation_steps=4, gradient_checkpointing=False)
    made = speed.data_parallel(_clock(link=1e9), work, gathered=8 * 10**9, trained=0)
    assert made.step == pytest.approx(2 * 2 * 4)  # two micro-batches, two passes, half of the weights are there
    alone = speed.data_parallel(_clock(link=1e9), work, gathered=0, trained=10**9)
    assert alone.step == pytest.approx(4)  # gradients cross once


def test_loading_takes_as_long_as_the_largest_part() -> None:
    assert _serving(_clock(disk=1e9), HALVES).load == pytest.approx(
        (sum(LLAMA.layer_bytes[16:]) + LLAMA.head_bytes) / 1e9
    )


# ---- against what is published of Sparks


def _predicted(name: str, ranks: int = 1, **changes: Any) -> ServingSpeed:
    made = plan.plan(serve(**changes), public(name), SPARKS[:ranks]).speed
    assert isinstance(made, ServingSpeed)
    return made


def test_decoding_comes_out_near_what_was_measured() -> None:
    # facts: Llama-3.3-70B FP8 332.7 ms a token on one box. Here in 16 bits, so twice that.
    assert 1 / _predicted("llama-3.1-70b", quantization=None).one == pytest.approx(2 * 0.3327, rel=0.05)
    # gpt-oss-120b without CUDA graphs: 26 tokens/s on one box (conselara.dev/notes/dgx-spark-benchmarks).
    assert _predicted("gpt-oss-120b").one == pytest.approx(26, rel=0.2)
    # An 8B model in BF16: 13.1 tokens/s (lyb.re/writing/2026-03-10-dgx-spark-vllm).
    assert _predicted("llama-3.1-8b", quantization=None).one == pytest.approx(13.1, rel=0.1)


def test_no_prediction_is_above_the_ceiling_of_the_memory() -> None:
    # facts: 405B in 4 bits over two boxes, 1.3 tokens/s for one stream, 2.5 for two interleaved ones.
    made = _predicted("llama-3.1-405b", ranks=2, max_num_seqs=2, max_model_len=512)
    assert 0.9 < made.one < 1.3
    assert 1.8 < made.full < 2.5


def _step(made: Plan) -> float:
    assert isinstance(made.speed, TrainingSpeed)
    return made.speed.step


def test_two_boxes_train_faster_than_one() -> None:
    card = public("llama-3.1-70b")
    recipe = tune(gradient_accumulation_steps=32)
    ratio = _step(plan.plan(recipe, card, SPARKS[:1])) / _step(plan.plan(recipe, card, SPARKS))
    assert 1.8 < ratio < 2  # a layer split has reached 1.96 with 32 micro-batches


def test_sharding_a_large_model_is_slower_than_a_pipeline() -> None:
    card = public("llama-3.1-70b")
    recipe = tune(adapter="lora", micro_batch_size=1, sequence_len=512, gradient_accumulation_steps=16)
    sharded = plan.plan(recipe.model_copy(update={"strategy": "fsdp2"}), card, SPARKS)
    assert _step(sharded) > _step(plan.plan(recipe, card, SPARKS))


def test_where_nothing_is_known_nothing_is_predicted() -> None:
    assert plan.plan(serve(quantization=None), LLAMA, cpus()).speed is None


def test_every_number_of_a_spark_names_its_source() -> None:
    assert len(SPARK.sources) == 5
    assert all(word in " ".join(SPARK.sources) for word in ("273", "78%", "125", "27%", "21.9", "28 us", "5.6", "1.07"))
    assert box.of(NODES, {})[0].speeds is SPARK
