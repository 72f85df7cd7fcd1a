"""A transfer is told in lines where nobody redraws a bar, and not at all when all was there."""

from __future__ import annotations

import pytest

from cluster.transfer import Progress
from sparkctl.carrying import CarryingView


def told(capsys: pytest.CaptureFixture[str], *moved: Progress, quiet: bool = False) -> str:
    with CarryingView(quiet=quiet) as view:
        for one in moved:
            view(one)
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def test_the_end_is_told_with_bytes_and_rate(capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, *(Progress("spark-b", done, 4 << 20, "over the link") for done in (0, 1 << 20, 4 << 20)))
    assert shown.startswith("spark-b: 4 MiB of 4 MiB over the link, ")
    assert shown.rstrip().endswith("/s")
    assert shown.count("\n") == 1


def test_what_was_there_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, Progress("spark-b", 7, 7, "over the link")) == ""
    assert told(capsys, Progress("spark-b", 0, 7, "x"), Progress("spark-b", 7, 7, "x"), quiet=True) == ""


def test_two_nodes_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    moved = [Progress(node, done, 2, "from the hub") for done in (0, 2) for node in ("spark-a", "spark-b")]
    assert {line.split(":")[0] for line in told(capsys, *moved).splitlines()} == {"spark-a", "spark-b"}
