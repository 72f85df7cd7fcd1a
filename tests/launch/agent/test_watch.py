"""What the head's agent makes of silence, carrier, progress, memory and the ends of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launch.agent.crew import over_rails
from launch.agent.view import LinkView, NodeView, RankView
from launch.agent.watch import SUCCEEDED, Attempt, is_well, judge, rails_up
from launch.spec import EndSpec

ATTEMPT = Attempt("job-1", 2, 100.0, 2, rails=(0, 1), joined=True)
LINK = LinkView(0.1, (0.1, 0.1))
GIB = 1 << 30


def rank(number: int, **changes: Any) -> RankView:
    return replace(RankView(number, "ab"[number], 10 + number, "running", 7, still_for=0.2), **changes)


def node(number: int, *ranks: RankView, **changes: Any) -> NodeView:
    seen = NodeView("ab"[number], 2, ranks or (rank(number),), 20 * GIB, GIB, (True, True), 100 * GIB)
    return replace(seen, **changes)


def verdict(
    head: NodeView, peer: NodeView, link: LinkView = LINK, **changes: Any
) -> tuple[str, int | None, bool] | None:
    found = judge(replace(ATTEMPT, **changes), (head, peer), link)
    return None if found is None else (found.reason, found.rank, found.again)


def test_all_is_well() -> None:
    assert verdict(node(0), node(1)) is None


def test_a_node_that_can_start_no_rank_any_more_ends_the_job_for_good() -> None:
    lost = node(1, attempt=0, ranks=(), lost="node b: the inventory's TOKEN was only in the memory of the agent")
    assert verdict(node(0), lost) == ("node b: the inventory's TOKEN was only in the memory of the agent", None, False)


def test_both_ended_well_is_success() -> None:
    assert judge(ATTEMPT, (node(0, rank(0, status=0)), node(1, rank(1, status=0))), LINK) is SUCCEEDED
    assert verdict(node(0, rank(0, status=0)), node(1)) is None


def test_a_killed_rank_is_the_cause_and_the_other_an_echo() -> None:
    echo = rank(0, status=1, dead_for=0.4, told=True, kind="peer", message="DistError: gone")
    killed = rank(1, status=-9, dead_for=0.3)
    assert verdict(node(0, echo), node(1, killed)) == ("rank 1 (node b) was ended by SIGKILL", 1, True)


def test_an_echo_alone_is_waited_for_a_moment() -> None:
    echo = rank(0, status=1, dead_for=0.4, told=True, kind="peer", message="DistError: gone")
    assert verdict(node(0, echo), node(1)) is None
    late = verdict(node(0, replace(echo, dead_for=1.2)), node(1))
    assert late == ("rank 0 (node a) ended with status 1: DistError: gone", 0, True)


def test_an_echo_of_an_agent_that_is_gone_is_put_down_to_the_agent() -> None:
    echo = rank(0, status=1, dead_for=2.0, told=True, kind="peer", message="DistError: gone")
    quiet = LinkView(2.0, (2.0, 2.0))
    assert verdict(node(0, echo), node(1), quiet) is None
    back = node(1, attempt=0, ranks=())
    assert verdict(node(0, echo), back) == ("the agent of node b ended and came back", None, True)
    gone = verdict(node(0, replace(echo, dead_for=6.5)), node(1), LinkView(6.5, (6.5, 6.5)))
    assert gone == ("node b: its agent fell silent and its rank broke off", None, True)


@pytest.mark.parametrize(("kind", "again"), [("crash", True), ("told", False), ("memory", False), ("peer", True)])
def test_only_what_may_pass_is_tried_again(kind: str, again: bool) -> None:
    failed = rank(1, status=1, dead_for=2.0, told=True, kind=kind, message="said why")
    found = verdict(node(0), node(1, failed))
    assert found == ("rank 1 (node b) ended with status 1: said why", 1, again)


def test_wrong_input_is_told_in_the_ranks_own_words() -> None:
    failed = rank(1, status=2, told=True, kind="input", message="rows.jsonl:3: no", fix="mend it")
    found = judge(ATTEMPT, (node(0), node(1, failed)), LINK)
    assert found is not None
    assert (found.reason, found.fix, found.wrong_input, found.again) == ("rows.jsonl:3: no", "mend it", True, False)


def test_silence_of_the_other_node_is_told_from_that_of_the_link() -> None:
    assert verdict(node(0), node(1), LinkView(9.0, (9.0, 9.0))) is None
    gone = verdict(node(0), node(1), LinkView(10.5, (10.5, 10.5)))
    assert gone == ("no word from node b for 10 s, on the link or beside it", None, True)
    dark = node(0, carrier=(False, False))
    assert verdict(dark, node(1), LinkView(0.2, (10.5, 10.6))) == (
        "nothing came over the link from b to a for 10 s (a's end of rail 0 has no carrier)", None, True,
    )  # fmt: skip
    found = verdict(node(0), node(1), LinkView(0.2, (0.2, 11.0)))
    assert found == ("nothing came over rail 1 of the link from b to a for 10 s (both ends have a carrier)", None, True)
    # A rail that this attempt does without may stay dark.
    assert verdict(dark, node(1), LinkView(0.2, (0.2, 99.0)), rails=(0,)) is None


def test_no_progress_for_long_is_a_hang_and_long_depends_on_the_steps() -> None:
    still = node(1, rank(1, still_for=16.0))
    found = verdict(node(0), still)
    assert found == ("rank 1 (node b) has made no progress for 15 s, after step 7", 1, True)
    assert verdict(node(0), still, step_seconds=4.0) is None
    assert verdict(node(0, rank(0, slowest=4.0)), still) is None
    assert verdict(node(0), node(1, rank(1, still_for=None))) is None  # it rests


def test_a_stopped_rank_is_named_and_not_the_one_that_waits_for_it() -> None:
    found = verdict(node(0, rank(0, still_for=30.0)), node(1, rank(1, still_for=29.0, halted_for=11.0)))
    assert found == ("rank 1 (node b) is stopped, as by SIGSTOP, for 10 s", 1, True)


def test_a_node_short_of_memory_is_relieved_and_not_tried_again() -> None:
    found = verdict(node(0), node(1, available=GIB // 2))
    assert found is not None
    reason, _, again = found
    assert reason.startswith("node b: only 0.5 GiB of memory were available; below 1.0 GiB")
    assert not again
    ended = node(1, rank(1, status=0), available=GIB // 2)
    assert verdict(node(0), ended) is None  # nothing of ours runs there


def test_an_agent_that_came_back_or_never_came_or_goes_is_told() -> None:
    anew = node(1, attempt=0, ranks=())
    assert verdict(node(0), anew) == ("the agent of node b ended and came back", None, True)
    assert verdict(node(0), anew, joined=False) == ("node b did not start its rank within 30 s", None, True)
    assert verdict(node(0), anew, joined=False, age=5.0) is None
    assert verdict(node(0), node(1, leaving=True)) == ("node b goes down", None, True)


def test_a_job_starts_again_when_both_nodes_and_the_link_are_well() -> None:
    idle = [node(0, attempt=2, ranks=()), node(1, attempt=2, ranks=())]
    assert is_well(idle, LINK, (GIB, GIB)) == ""
    assert is_well(idle, LINK, (GIB, 20 * GIB)) == "node b has 20.0 GiB of memory available, and the job needs 20.0"
    assert is_well([idle[0], node(1)], LINK, (0, 0)) == "node b is still ending its rank"
    assert is_well([idle[0], replace(idle[1], disk_free=0)], LINK, (0, 0)) == "node b has 0 MiB of disk free"
    assert is_well(idle, LinkView(5.0, (5.0, 5.0)), (0, 0)) == "the other node does not answer"
    assert is_well(idle, LinkView(0.1, (5.0, 5.0)), (0, 0)) == "the link carries nothing"
    assert is_well(idle[:1], None, (0,)) == ""


def test_rails_that_work_have_carrier_at_both_ends_and_words() -> None:
    assert rails_up((node(0), node(1)), LINK) == (0, 1)
    assert rails_up((node(0), node(1, carrier=(False, True))), LINK) == (1,)
    assert rails_up((node(0), node(1)), LinkView(0.1, (0.1, 4.0))) == (0,)


def test_the_environment_follows_the_rails_that_work() -> None:
    ends = (EndSpec(interface="x0", address="10.0.0.1"), EndSpec(interface="x1", address="10.0.1.1"))
    rendered = {"GLOO_SOCKET_IFNAME": "x0,x1", "NCCL_IB_HCA": "r0,r1", "NCCL_SOCKET_IFNAME": "x0", "OTHER": "x0,x1,x2"}
    assert over_rails(rendered, ends, (0, 1)) == rendered
    assert over_rails(rendered, ends, (1,)) == rendered | {
        "GLOO_SOCKET_IFNAME": "x1", "NCCL_IB_HCA": "r1", "NCCL_SOCKET_IFNAME": "x1",
    }  # fmt: skip
