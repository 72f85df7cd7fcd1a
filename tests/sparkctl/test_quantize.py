"""`sparkctl quantize` says what it made, and leaves nothing half made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.errors import WrongInputError
from sparkctl.cli import cli
from tests import models


@pytest.mark.timeout(600)
def test_it_writes_a_copy_and_says_how_large(tmp_path: Path) -> None:
    source = models.make(tmp_path / "model", "qwen3-moe")
    done = CliRunner().invoke(cli, ["quantize", str(source), "-o", str(tmp_path / "copy"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["folder"] == str(tmp_path / "copy")
    assert 0 < told["bytes"] < told["bytes_before"]
    assert (tmp_path / "copy" / "tokenizer.json").is_file()


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["quantize", str(tmp_path), "-o", str(tmp_path / "copy")])
    assert isinstance(done.exception, WrongInputError)
    assert "no config.json in it" in done.exception.message
    assert not (tmp_path / "copy").exists()
