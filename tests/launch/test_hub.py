"""A model on the hub is known by its configuration and headers alone; who may not see it, or cannot, is told in a line."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import FailedError, SparkctlError, WrongInputError
from launch import hub, model_card
from tests import models
from tests.launch.loopback_hub import Hub, serving


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback with nothing on it, and a cache of its own."""
    cache = str(tmp_path / "cache")
    # The library reads its folder when it is imported, and that may have been before.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    level = logging.getLogger("huggingface_hub").level
    with serving(Hub()) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served
    logging.getLogger("huggingface_hub").setLevel(level)


def test_a_card_is_read_without_the_weights(own: Hub, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model", hidden_size=256, intermediate_size=512)
    own.models["org/model"] = folder
    card = hub.read("org/model")
    here = model_card.read(folder)
    assert (card.source, card.name, card.has_weights) == ("org/model", "model", True)
    assert (card.stack, card.embedding, card.head) == (here.stack, here.embedding, here.head)
    assert {path.rpartition("/")[2] for _, path, _ in own.asked} <= {"", "config.json", "model.safetensors"}
    assert all(part for method, path, part in own.asked if method == "GET" and path.endswith(".safetensors"))
    assert own.sent < (folder / "model.safetensors").stat().st_size / 10


def test_several_files_are_one_model(own: Hub, tmp_path: Path) -> None:
    import transformers

    folder = models.make(tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "parts", max_shard_size="200kB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    own.models["org/parts"] = tmp_path / "parts"
    assert hub.read("org/parts").stack == model_card.read(folder).stack


def test_a_model_without_safetensors_is_told_from_its_configuration(own: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    models.config("qwen2").save_pretrained(tmp_path / "model")
    own.models["org/pickled"] = tmp_path / "model"
    card = hub.read("org/pickled")
    assert (card.has_weights, card.layers) == (False, 4)


@pytest.mark.parametrize("status", [401, 403])
def test_a_licence_that_is_not_accepted_is_told_in_a_line(status: int, own: Hub) -> None:
    own.gated["meta-llama/Llama-3.1-405B"] = status
    error = _error(own, "meta-llama/Llama-3.1-405B")
    assert isinstance(error, FailedError)
    assert error.message == (
        f"meta-llama/Llama-3.1-405B: the hub answers {status}: "
        "its licence has to be accepted first, by the account that asks"
    )
    assert error.fix == f"accept it at {own.endpoint}/meta-llama/Llama-3.1-405B, then `hf auth login` or set HF_TOKEN"


def test_a_model_that_is_not_there_is_told_apart(own: Hub, tmp_path: Path) -> None:
    error = _error(own, "org/absent")
    assert isinstance(error, WrongInputError)
    assert error.message.startswith("org/absent: no such model folder, and on the hub it is not there, or private")
    (tmp_path / "model").mkdir()
    own.models["org/data"] = tmp_path / "model"
    assert "has no config.json" in _error(own, "org/data").message


def test_damaged_files_are_told_as_such(own: Hub, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    own.models["org/model"] = folder
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "its safetensors cannot be read" in _error(own, "org/model").message
    os.truncate(folder / "model.safetensors", 0)
    assert "its safetensors cannot be read" in _error(own, "org/model").message
    (folder / "config.json").write_text(json.dumps([]))
    own.models["org/other"] = folder
    assert _error(own, "org/other").message == "org/other/config.json: holds no JSON object"


def test_a_hub_that_cannot_be_reached_is_told_at_once(own: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = _error(own, "org/model")
    assert isinstance(error, FailedError)
    assert error.message == "org/model: no such model folder, and the hub cannot be reached (http://127.0.0.1:9)"


def _error(own: Hub, repository: str) -> SparkctlError:
    with pytest.raises(SparkctlError) as wrong:
        hub.read(repository)
    assert wrong.value.fix
    assert "\n" not in wrong.value.message
    return wrong.value


@pytest.mark.parametrize(
    ("reference", "is_id"),
    [
        ("Qwen/Qwen3-32B", True),
        ("meta-llama/Llama-3.1-8B", True),
        ("./model", False),
        ("/models/a", False),
        ("model", False),
        ("../a/b", False),
        ("a/b/c", False),
        ("~/model", False),
    ],
)
def test_what_may_be_a_model_of_the_hub(reference: str, is_id: bool) -> None:
    assert hub.is_id(reference) == is_id
