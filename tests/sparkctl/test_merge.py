"""`sparkctl merge` adds a job's adapter into its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commandline import finished


@pytest.mark.timeout(600)
def test_a_jobs_adapter_is_merged_and_a_second_time_refused(tmp_path: Path) -> None:
    seen = finished()
    done = seen.commands("merge", seen.job.id, "-o", str(tmp_path / "merged"), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["changed"] > 0
    assert told["bytes"] > 0
    assert (tmp_path / "merged" / "config.json").is_file()
    again = seen.commands("merge", seen.job.id, "-o", str(tmp_path / "merged"))
    assert again.returncode == 2
    assert "is there already" in again.stderr
