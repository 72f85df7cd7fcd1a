"""A node's half is a model folder of its own: what one stage loads, byte for byte, and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cluster.errors import WrongInputError
from cluster.transfer.pulling import Here, Pull
from cluster.transfer.shelf import Shelf
from cluster.transfer.staging import Staging
from launch import contents, placement
from launch.contents import Contents
from launch.placement import Placement
from launch.shard.stage import Stage
from launch.split import Cut, whole
from tests import models

LAYERS = 4
CUTS = (Cut(0, 2, LAYERS), Cut(2, LAYERS, LAYERS))


def look(folder: Path) -> Contents:
    told = contents.look(str(folder))
    assert told is not None
    return Contents.of(json.loads(json.dumps(told)))


def lay(placed: Placement, source: Path, home: Path) -> Path:
    """Have a placement lie in `home`, as a node would."""
    staging = Staging(str(home / placed.name), placed.manifest)
    if not staging.complete:
        staging.begin()
        pull = Pull(staging)
        pull.run([Here(Shelf(str(source)))])
        assert pull.error is None
    return home / placed.name


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen3-moe", "gpt-oss", "deepseek-v3", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make(tmp_path_factory.mktemp("models") / request.param, request.param)


def load(folder: Path, cut: Cut) -> Stage:
    return Stage.load(folder, cut, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_stage_loads_the_same_from_its_half(model: Path, cut: Cut, tmp_path: Path) -> None:
    before = digest(model)
    half = lay(placement.of_model(look(model), cut), model, tmp_path)
    assert digest(model) == before
    there, here = load(model, cut).model.state_dict(), load(half, cut).model.state_dict()
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)
    assert (half / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert (half / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_two_halves_are_the_whole_and_little_more(model: Path, tmp_path: Path) -> None:
    halves = [lay(placement.of_model(look(model), cut), model, tmp_path) for cut in CUTS]
    found = [names(half) for half in halves]
    everything = names(model)
    assert found[0] | found[1] == everything
    assert found[0] & found[1] <= {"model.embed_tokens.weight"}
    with safe_open(model / "model.safetensors", "pt") as source:
        for half, own in zip(halves, found, strict=True):
            with safe_open(half / "model.safetensors", "pt") as made:
                assert made.metadata() == source.metadata()
                for name in own:
                    assert torch.equal(made.get_tensor(name), source.get_tensor(name))


def test_several_files_become_those_that_hold_something_with_an_index_of_their_own(tmp_path: Path) -> None:
    source = sharded(tmp_path)
    for cut in CUTS:
        placed = placement.of_model(look(source), cut)
        half = lay(placed, source, tmp_path / "home")
        index = json.loads((half / "model.safetensors.index.json").read_text())
        files = {path.name for path in half.glob("*.safetensors")}
        assert set(index["weight_map"].values()) == files
        for name in files:
            with safe_open(half / name, "pt") as made:
                assert set(made.keys()) == {tensor for tensor, file in index["weight_map"].items() if file == name}
        assert index["metadata"]["total_size"] > 0
        there, here = load(source, cut).model.state_dict(), load(half, cut).model.state_dict()
        assert all(torch.equal(there[name], here[name]) for name in there)
        # The header apart, no byte that the stage does not hold.
        held = sum(tensor.nbytes for tensor in here.values())
        assert sum((half / name).stat().st_size for name in files) < held + 4096 * len(files)
    assert len({path.name for path in (tmp_path / "home").iterdir()}) == 2


def test_a_whole_model_stays_as_it_is(tmp_path: Path) -> None:
    source = sharded(tmp_path)
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    (source / "modeling_own.py").write_text("print('code of its own')")
    made = lay(placement.of_model(look(source), whole(LAYERS)), source, tmp_path / "home")
    kept = {path.name for path in made.iterdir()}
    assert kept == {path.name for path in source.iterdir()} - {"pytorch_model.bin", "modeling_own.py"}
    assert all((made / name).read_bytes() == (source / name).read_bytes() for name in kept)


def sharded(tmp_path: Path) -> Path:
    import transformers

    whole_ = models.make(tmp_path / "one")
    model = transformers.AutoModelForCausalLM.from_pretrained(whole_)
    model.save_pretrained(tmp_path / "parts", max_shard_size="150kB")
    models.tokenizer().save_pretrained(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    return tmp_path / "parts"


def test_another_model_another_cut_and_another_time_have_other_folders(tmp_path: Path) -> None:
    one, two = models.make(tmp_path / "a" / "model"), models.make(tmp_path / "b" / "model", vocab_size=300)
    made = {placement.of_model(look(one), cut).name for cut in (*CUTS, whole(LAYERS))}
    made.add(placement.of_model(look(two), CUTS[0]).name)
    assert len(made) == 4
    assert placement.of_model(look(one), CUTS[0]).name in made
    (one / "model.safetensors").touch()  # written again, by a fine-tune say, with other numbers in the same shapes
    assert placement.of_model(look(one), CUTS[0]).name not in made
    assert all(name.startswith("model-") and "/" not in name for name in made)


def test_the_same_model_at_two_places_is_known(tmp_path: Path) -> None:
    one, two = models.make(tmp_path / "a"), models.make(tmp_path / "b")
    (two / "README.md").write_text("downloaded")
    assert placement.same(look(one), look(two))
    assert not placement.same(look(one), look(models.make(tmp_path / "c", hidden_size=128)))
    with (two / "model.safetensors").open("r+b") as file:  # the same shapes, other numbers
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    assert not placement.same(look(one), look(two))


def test_what_is_wrong_with_a_folder_is_told(tmp_path: Path) -> None:
    source = sharded(tmp_path)
    victim = sorted(source.glob("*.safetensors"))[1]
    data = victim.read_bytes()
    victim.write_bytes(data[:-10])
    with pytest.raises(WrongInputError, match="cut short"):
        placement.of_model(look(source), CUTS[0])
    victim.unlink()
    assert f"names {victim.name}, which is not there" in look(source).broken
    assert contents.look(str(tmp_path / "absent")) is None
    assert contents.look("a\0b") is None
    (source / "config.json").unlink()
    with pytest.raises(WrongInputError, match=r"no config\.json in it"):
        placement.of_model(look(source), CUTS[0])


def test_a_dataset_and_an_adapter_travel_whole(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"question": "?", "answer": "!"}\n')
    placed = placement.of_files(look(tmp_path / "pairs.jsonl"))
    made = lay(placed, tmp_path, tmp_path / "home")
    assert (made / "pairs.jsonl").read_bytes() == (tmp_path / "pairs.jsonl").read_bytes()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"12345678")
    made = lay(placement.of_files(look(adapter)), adapter, tmp_path / "home")
    assert {path.name for path in made.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
