"""What a rank tells its agent through the pipe."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launch.agent.report import REPORT_FD, Report, Reporter, Reports


def test_what_is_told_arrives_whole_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    monkeypatch.setenv(REPORT_FD, str(write))
    told = [
        Report("loading"),
        Report("step", step=3),
        Report("failed", kind="input", message="naïve\nlines", fix="mend"),
    ]
    reporter = Reporter()
    for report in told:
        reporter.tell(report)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        sent = pipe.read()
    reports = Reports()
    assert [report for index in range(len(sent)) for report in reports.feed(sent[index : index + 1])] == told


def test_without_an_agent_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REPORT_FD, raising=False)
    Reporter().tell(Report("loading"))


def test_a_rank_whose_agent_is_gone_ends_at_its_first_word() -> None:
    read, write = os.pipe()
    os.close(read)
    script = "from launch.agent.report import Report, Reporter; Reporter().tell(Report('loading')); print('went on')"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, REPORT_FD: str(write)},
            pass_fds=[write],
            capture_output=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stdout) == (1, b"")
