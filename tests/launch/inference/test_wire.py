"""What travels between the stages comes out as it went in, and a step that only goes on is a header alone."""

from __future__ import annotations

import torch

from launch.inference.request import GenerationRequest, Sampling
from launch.inference.sampler import Row
from launch.inference.wire import Told, WireOpening, WireRow, WireStep, read_reply, reply_size, told

RULE = Sampling(
    temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.3, presence_penalty=-1.5,
    frequency_penalty=0.25, seed=2**53 - 1, logprobs=4,
)  # fmt: skip


def test_a_step_comes_out_as_it_went_in() -> None:
    request = GenerationRequest("a", (5, 6, 7), 9, RULE, prompt_logprobs=2)
    opening = WireOpening.of(request, slot=3, source=1, shared=2, drawn=[8, 9])
    step = WireStep(1, (WireRow(3, 2, 4, draws=False, adapter=2, scores=1), WireRow(4, 0, 3)), (opening,), keep=0)
    again = WireStep.unpack(step.pack())
    assert (again.group, again.rows, again.keep) == (step.group, step.rows, step.keep)
    back = again.openings[0]
    assert (back.slot, back.source, back.shared, back.logprobs, back.prompt_logprobs) == (3, 1, 2, 4, 2)
    assert back.row.sampling == RULE.model_copy(update={"logprobs": None})
    assert (tuple(back.row.prompt), back.row.drawn) == ((5, 6, 7), [8, 9])


def test_a_prompt_travels_only_where_the_draw_depends_on_it() -> None:
    plain = WireOpening.of(GenerationRequest("a", (5, 6, 7), 9), 0, 0, 0, [])
    assert WireStep.unpack(WireStep(0, (WireRow(0, 0, 3),), (plain,)).pack()).openings[0].row == Row(Sampling(), [])


def test_going_on_is_recognised_and_nothing_else() -> None:
    read = WireStep(0, (WireRow(2, 0, 5), WireRow(3, 0, 4)))
    decode = WireStep(0, (WireRow(2, 5, 1), WireRow(3, 4, 1)))
    assert decode.follows(read)
    assert read.again() == decode
    assert decode.again().follows(decode)
    assert not decode.follows(None)
    assert not decode.follows(decode)
    assert not WireStep(0, (WireRow(2, 6, 1),)).follows(decode), "one has left"
    assert not WireStep(0, (WireRow(2, 6, 1, adapter=1), WireRow(3, 5, 1))).follows(decode)
    assert not WireStep(0, (WireRow(2, 0, 3, draws=False),)).follows(None)


def test_a_reply_has_the_size_that_both_sides_expect_and_says_what_was_told() -> None:
    step = WireStep(0, (WireRow(0, 0, 3, scores=2), WireRow(1, 4, 1), WireRow(2, 0, 8, draws=False)))
    tops = [(1, 2), (-1, -1), (0, 0)]
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    numbers = [1.5, *told(2, logits, 2), *told(3, logits, 2), *told(1, logits, 1), *told(0, logits, -1)]
    assert len(numbers) == reply_size(step, tops)
    reply = read_reply(torch.tensor(numbers, dtype=torch.float64), step, tops)
    assert reply.busy == 1.5
    (scored, drawn), (nothing, plain), (none, undrawn) = reply.rows
    assert [one.token for one in scored] == [2, 3]
    assert [token for token, _ in scored[0].top] == [1, 3]
    assert drawn is not None
    assert drawn.token == 1
    assert drawn.logprob == drawn.top[0][1]
    assert (nothing, plain, none, undrawn) == ((), Told(0), (), None)
