"""Each node fetches its own ranges from the hub: once, verified, with a token that only the hub is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from cluster import transfer
from cluster.errors import FailedError, WrongInputError
from cluster.transfer import End
from cluster.transport.local import LocalTransport
from launch import halves, hub_files, origin, placement
from launch.halves import Site, Wants
from launch.split import Cut, whole
from tests import models
from tests.launch.loopback_hub import Hub, serving

LAYERS = 4
CUTS = {"left": Cut(0, 2, LAYERS), "right": Cut(2, LAYERS, LAYERS)}
SITES = tuple(Site(End(LocalTransport(name), ("127.0.0.1",))) for name in CUTS)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback with one model, split into files."""
    import transformers

    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    made = models.make(tmp_path / "one", hidden_size=256, intermediate_size=512)
    model = transformers.AutoModelForCausalLM.from_pretrained(made)
    model.save_pretrained(tmp_path / "model", max_shard_size="2MB")
    models.tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    level = logging.getLogger("huggingface_hub").level
    with serving(Hub()) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        served.models["org/model"] = tmp_path / "model"
        yield served
    logging.getLogger("huggingface_hub").setLevel(level)


def place(cuts: dict[str, Cut]) -> dict[str, Path]:
    found = origin.find("org/model", [site.transport for site in SITES], local=None)
    placed = halves.place(Wants(found), cuts, SITES, lambda progress: None)
    return {name: Path(one.model) for name, one in placed.items()}


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_the_hubs_card_is_that_of_the_folder(own: Hub) -> None:
    from launch import model_card

    found = hub_files.origin("org/model")
    here = model_card.read(own.models["org/model"])
    assert found.card().stack == here.stack
    assert found.card().source == "org/model"
    assert found.revision
    assert own.sent < stored(own.models["org/model"]) / 2


def test_each_node_fetches_its_own_half(own: Hub, tmp_path: Path) -> None:
    source = own.models["org/model"]
    made = place(CUTS)
    own.sent = 0
    assert place(CUTS) == made  # there already: only looked at
    assert own.sent < stored(source) / 4
    tensors: dict[str, set[str]] = {}
    for name, folder in made.items():
        assert folder.parent == tmp_path / "home" / "halves"
        assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        held = set[str]()
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as ours, safe_open(source / path.name, "pt") as theirs:
                for tensor in ours.keys():  # noqa: SIM118 - it is no dictionary
                    assert ours.get_tensor(tensor).equal(theirs.get_tensor(tensor))
                    held.add(tensor)
        tensors[name] = held
    assert not tensors["left"] & tensors["right"]
    assert stored(made["left"]) + stored(made["right"]) < stored(source) * 1.02


def test_a_break_is_mended_by_asking_again(own: Hub) -> None:
    own.breaks_off = 3
    made = place({"left": whole(LAYERS)})["left"]
    assert own.breaks_off == 0
    source = own.models["org/model"]
    assert all((made / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())


def test_what_is_elsewhere_is_not_shown_the_token(own: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_only_for_the_hub")
    own.private, own.sends_on = "hf_only_for_the_hub", True
    made = place(CUTS)
    assert stored(made["left"]) + stored(made["right"]) >= stored(own.models["org/model"])
    asked = [(path, token) for path, token in own.tokens if "/org/model" in path]
    shown = {path.startswith("/elsewhere/"): set[str]() for path, _ in asked}
    for path, token in asked:
        shown[path.startswith("/elsewhere/")].add(token)
    assert shown == {False: {"Bearer hf_only_for_the_hub"}, True: {""}}


def test_a_file_that_is_not_what_the_hub_says_is_not_taken(own: Hub) -> None:
    found = hub_files.origin("org/model")
    source = own.models["org/model"]
    victim = sorted(source.glob("*.safetensors"))[0]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(FailedError) as failed:
        halves.place(Wants(found), {"left": whole(LAYERS)}, SITES, lambda progress: None)
    assert f"{victim.name}: its SHA-256 is not what the source says" in failed.value.message


def test_a_licence_is_told_in_one_line_by_whoever_meets_it(own: Hub) -> None:
    found = hub_files.origin("org/model")
    own.gated["org/model"] = 403
    with pytest.raises(FailedError) as failed:
        hub_files.origin("org/model")
    assert failed.value.message.startswith("org/model: the hub answers 403: its licence has to be accepted first")
    with pytest.raises(FailedError) as failed:
        halves.place(Wants(found), {"left": CUTS["left"]}, SITES, lambda progress: None)
    assert "left: model-layers-0-1" in failed.value.message.replace("embedding-", "")
    assert "its licence has to be accepted first" in failed.value.message
    assert "\n" not in failed.value.message


def test_what_is_nowhere_is_told(own: Hub) -> None:
    nodes = [site.transport for site in SITES]
    with pytest.raises(WrongInputError, match="org/absent: no such model folder, and on the hub it is not there"):
        origin.find("org/absent", nodes, local=None)
    with pytest.raises(WrongInputError, match="/absent: no such model here or on left or on right"):
        origin.find("/absent", nodes, local=None)
    with pytest.raises(WrongInputError, match="middle:/x: no node is named middle"):
        origin.find("middle:/x", nodes, local=None)
    with pytest.raises(WrongInputError, match="left:/absent: left has nothing there"):
        origin.find("left:/absent", nodes, local=None)


def test_progress_is_told(own: Hub) -> None:
    found = hub_files.origin("org/model")
    seen: list[transfer.Progress] = []
    halves.place(Wants(found), {"left": CUTS["left"]}, SITES, seen.append)
    total = placement.of_model(found.contents, CUTS["left"]).manifest.moved
    assert (seen[-1].node, seen[-1].done, seen[-1].total, seen[-1].how) == ("left", total, total, "from the hub")
