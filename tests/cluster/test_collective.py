"""Two real ranks reduce a tensor together, started on a node as `up` does it; what they tell is read with care."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import collective, environ, reducer
from cluster.doctor.bandwidth import judge
from cluster.finding import Finding, Level
from cluster.inventory import Link
from cluster.measurement import Collective, Wire
from cluster.transport.local import LocalTransport
from tests.cluster.doctor.pair import HCAS, measured

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"gloo": 1 << 20, "nccl": 1 << 20}
LOOPBACK = tuple(Wire(("lo", "lo"), ("127.0.0.1", "127.0.0.1"), HCAS, 65536) for _ in (0, 1))
RAILS = tuple(
    Wire((name, name), ("", ""), (hca, hca), 9000) for name, hca in zip(("first", "second"), HCAS, strict=True)
)


def environment(rank: int) -> dict[str, str]:
    return environ.embedded(rank=rank, world_size=2, cores=2, interfaces=("lo",), port=0)


def reduced(python: str = sys.executable, **changed: str) -> Collective:
    with LocalTransport("spark-a") as head, LocalTransport("spark-b") as peer:
        return collective.measure(
            (head, peer),
            (sys.executable, python),
            (str(ROOT), str(ROOT)),
            (environment(0) | changed, environment(1)),
            LOOPBACK,
            sizes=SMALL,
        )


def findings(found: Collective) -> list[Finding]:
    return [one for one in judge(measured().with_collective(found), Link()) if one.check == "collective"]


def test_two_ranks_reduce_over_the_interfaces_that_they_were_given() -> None:
    found = reduced()
    assert found.error == ""
    assert (found.backend, found.size, found.moved) == ("gloo", 1 << 20, collective.ROUNDS << 20)
    assert found.bus > 0
    assert found.carried is not None
    assert found.carried >= found.moved
    (finding,) = findings(found)
    assert finding.level is Level.OK
    assert "all of it over the rails, as their counters show" in finding.evidence


def test_a_rank_that_cannot_start_is_named_and_nothing_is_waited_for(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no torch here' >&2\nexit 1\n")
    python.chmod(0o755)
    with LocalTransport("spark-a") as head:
        found = collective.measure(
            (head, head), (str(python), str(python)), ("/", "/"), (environment(0), environment(1)), LOOPBACK
        )
    assert found.error.startswith("spark-a: ")
    assert "no torch here" in found.error
    (finding,) = findings(found)
    assert finding.level is Level.FAIL
    assert finding.fix


def test_an_address_that_the_head_does_not_have_is_told() -> None:
    found = reduced(MASTER_ADDR="192.0.2.1")
    assert "192.0.2.1" in found.error


def told(**sent: int) -> dict[str, Any]:
    return {"backend": "gloo", "size": 1000, "seconds": 0.5, "right": True, "sent": sent}


def test_what_the_rails_did_not_carry_fails_and_names_the_way_it_took() -> None:
    whole = told(first=4000, second=2100, enP7s7=90)
    found = collective.read((whole, whole), RAILS)
    assert (found.carried, found.moved) == (6100, 6000)
    assert findings(found)[0].level is Level.OK
    elsewhere = collective.read((whole, told(first=20, second=0, enP7s7=6100)), RAILS)
    assert (elsewhere.carried, elsewhere.astray) == (20, "enP7s7")
    (finding,) = findings(replace(elsewhere, backend="nccl"))
    assert finding.level is Level.FAIL
    assert finding.evidence.endswith("the rails carried only 0 of 0 MB, and enP7s7 the rest")


def test_bytes_that_went_by_rdma_are_the_devices_own_to_count(tmp_path: Path) -> None:
    counter = tmp_path / HCAS[0] / "ports" / "1" / "counters" / "port_xmit_data"
    counter.parent.mkdir(parents=True)
    counter.write_text("1500\n")
    assert reducer.sent(str(tmp_path))[HCAS[0]] == 6000
    whole = told(first=10, second=10, **{HCAS[0]: 3000, HCAS[1]: 3100})
    assert collective.read((whole, whole), RAILS).carried == 6120


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"seconds": 0},
        {"seconds": float("nan")},
        {"size": -1},
        {"backend": "mpi"},
        {"sent": 3},
        {"sent": {"a": "b"}},
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(broken: dict[str, Any]) -> None:
    answer = told() | broken if broken else {}
    with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
        collective.read((answer, answer), RAILS)


def test_a_wrong_sum_fails() -> None:
    wrong = told(first=6000) | {"right": False}
    (finding,) = findings(collective.read((wrong, told(first=6000)), RAILS))
    assert finding.level is Level.FAIL
    assert "the sum is wrong" in finding.evidence
