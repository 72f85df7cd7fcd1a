"""A cut is contiguous, complete, and no other one has a lighter heaviest stage."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise

import pytest

from cluster.errors import WrongInputError
from launch.split import AMPLE, Cut, balance, every_cut, has_room, whole


def _costs(cuts: Sequence[Cut], layers: Sequence[int], embedding: int, head: int) -> list[int]:
    return [sum(layers[c.start : c.end]) + embedding * c.first + head * c.last for c in cuts]


def _every_cut(layers: int, stages: int) -> Iterator[tuple[Cut, ...]]:
    for inner in combinations(range(1, layers), stages - 1):
        yield tuple(Cut(start, end, layers) for start, end in pairwise((0, *inner, layers)))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_cut_is_better_balanced(stages: int) -> None:
    draw = random.Random(stages)  # noqa: S311 - reproducible, not secret
    for _ in range(150):
        count = draw.randint(stages, 9)
        layers = [draw.choice((0, 1, 2, 3, 10, 100)) for _ in range(count)]
        embedding, head = draw.choice((0, 5, 50)), draw.choice((0, 5, 50))
        cuts = balance(layers, stages=stages, embedding_cost=embedding, head_cost=head)
        heaviest = {cut: max(_costs(cut, layers, embedding, head)) for cut in _every_cut(count, stages)}
        assert cuts in heaviest, "contiguous, complete and with a layer on every stage"
        assert heaviest[cuts] == min(heaviest.values())
        equally_good = [cut for cut, cost in heaviest.items() if cost == heaviest[cuts]]
        assert cuts[-1].start == max(cut[-1].start for cut in equally_good)


def test_equal_layers_are_halved() -> None:
    assert balance([7] * 10, stages=2) == (Cut(0, 5, 10), Cut(5, 10, 10))
    assert balance([7] * 9, stages=2) == (Cut(0, 5, 9), Cut(5, 9, 9))  # of two equally good cuts this one


def test_the_embedding_weighs_on_the_first_stage_and_the_head_on_the_last() -> None:
    assert [str(cut) for cut in balance([1] * 8, stages=2, head_cost=4)] == [
        "embedding + layers 0-5",
        "layers 6-7 + head",
    ]
    assert balance([1] * 8, stages=2, embedding_cost=4)[0].end == 2
    assert balance([1] * 8, stages=2, embedding_cost=4, head_cost=4)[0].end == 4
    assert balance([1] * 8, stages=2, head_cost=1000)[1] == Cut(7, 8, 8)  # at least one layer stays on each


def test_costs_may_be_seconds() -> None:
    assert balance([0.5, 0.25, 0.25], stages=2)[0].end == 1


def test_a_model_held_by_one_rank_is_one_cut() -> None:
    assert balance([3, 1, 2], stages=1, embedding_cost=9) == (whole(3),)
    assert (whole(3).first, whole(3).last, str(whole(3))) == (True, True, "embedding + layers 0-2 + head")
    assert str(Cut(1, 2, 3)) == "layer 1"


@pytest.mark.parametrize(("layers", "said"), [(1, "1 layer, fewer"), (3, "3 layers, fewer"), (0, "0 layers, fewer")])
def test_fewer_layers_than_stages_are_refused_with_a_way_out(layers: int, said: str) -> None:
    with pytest.raises(WrongInputError, match=said) as wrong:
        balance([1] * layers, stages=4)
    assert "nodes: 1" in wrong.value.fix


def _filled(sizes: Sequence[int], limits: Sequence[int]) -> Callable[[Cut, int], float]:
    return lambda cut, stage: sum(sizes[cut.start : cut.end]) / limits[stage]


def test_where_there_is_room_the_faster_cut_is_taken_and_else_the_more_even_one() -> None:
    seconds, sizes = [1] * 8, [10] * 8
    roomy = balance(seconds, stages=2, head_cost=4, filled=_filled(sizes, (100, 100)))
    assert roomy[0].end == 6
    for limit in (55, 50, 44, 30):  # with 5 layers more than AMPLE of it is filled, or it does not hold them at all
        assert limit * AMPLE < 50
        assert balance(seconds, stages=2, head_cost=4, filled=_filled(sizes, (limit, limit)))[0].end == 4


def test_the_larger_node_takes_more() -> None:
    sizes = [10] * 9
    cuts = balance([1] * 9, stages=2, filled=_filled(sizes, (35, 100)))
    assert [cut.end for cut in cuts] == [3, 9]
    assert balance([1] * 9, stages=2, filled=_filled(sizes, (20, 40)))[0].end == 3  # too small both: evenly so


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_there_is_room_if_and_only_if_some_cut_fits(stages: int) -> None:
    draw = random.Random(stages)  # noqa: S311 - reproducible, not secret
    found = set()
    for _ in range(300):
        sizes = [draw.randint(1, 9) for _ in range(draw.randint(stages, 9))]
        limits = [draw.randint(1, 30) for _ in range(stages)]
        filled = _filled(sizes, limits)
        fitting = [
            cuts
            for cuts in every_cut(len(sizes), stages)
            if all(filled(cut, stage) <= 1 for stage, cut in enumerate(cuts))
        ]
        assert has_room(len(sizes), stages, filled) == bool(fitting)
        found.add(bool(fitting))
        best = balance([1] * len(sizes), stages=stages, filled=filled)
        assert all(filled(cut, stage) <= 1 for stage, cut in enumerate(best)) == bool(fitting)
    assert found == {True, False}
