"""A model of the hub's on the embedded pair: fetched once, read by both ranks, given back by `clean`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import models
from tests.commandline import CommandLine
from tests.launch.loopback_hub import Hub, serving

pytestmark = pytest.mark.timeout(300)
QUESTION = "What is 3?"


def test_a_model_is_fetched_once_and_answers_as_its_folder_does(tmp_path: Path) -> None:
    models.make(tmp_path / "model")
    (tmp_path / "here.yaml").write_text("kind: inference\nbase_model: ./model\nmax_model_len: 64\n")
    (tmp_path / "there.yaml").write_text("kind: inference\nbase_model: owner/tiny\nmax_model_len: 64\n")
    weights = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    with serving(Hub({"owner/tiny": tmp_path / "model"})) as hub:
        commands = CommandLine(tmp_path, HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="0")
        expected = _answer(commands, "here.yaml")
        assert hub.sent == 0
        assert _answer(commands, "there.yaml") == expected
        first = hub.sent
        assert first >= weights
        assert _answer(commands, "there.yaml") == expected
        assert hub.sent - first < weights  # what it holds was asked, the weights were there
        (folder,) = (commands.home / "halves").glob("[!.]*")
        assert (folder / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
        cleaned = commands("clean", "--yes")
        assert cleaned.returncode == 0, cleaned.stderr
        assert not folder.exists()


def test_a_hub_that_cannot_be_reached_is_told_in_two_lines(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("kind: inference\nbase_model: owner/tiny\n")
    commands = CommandLine(
        tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="0"
    )
    done = commands("run", "there.yaml")
    assert done.returncode == 1
    error, fix = done.stderr.splitlines()[-2:]
    assert "owner/tiny: no such model folder, and the hub cannot be reached (http://127.0.0.1:9)" in error
    assert "hf download owner/tiny" in fix
    assert commands.jobs() == []


def _answer(commands: CommandLine, recipe: str) -> str:
    done = commands("ask", recipe, QUESTION, "--max-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)[0]["answer"])
