"""Wrong recipes, models and data: told in a line or two with exit status 2 or 3, before anything is started or made."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sparkctl.cli import main
from tests.commandline import INVENTORY, RECIPE, rows

LAYERS, WIDTH = 4, 8


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where all is right: a recipe, its data, a model of zeros, an inventory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPARKCTL_INVENTORY", str(tmp_path / "pair.yaml"))
    (tmp_path / "pair.yaml").write_text(INVENTORY)
    (tmp_path / "tiny.yaml").write_text(RECIPE.strip() + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(rows()))
    (tmp_path / "model").mkdir()
    _write_config(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.weight" for i in range(LAYERS)), "lm_head.weight"]
    (tmp_path / "model" / "model.safetensors").write_bytes(_safetensors(names))
    return tmp_path


def _write_config(model: Path, **changes: object) -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 1,
        "hidden_size": WIDTH,
        "vocab_size": WIDTH,
        "max_position_embeddings": 128,
    }
    (model / "config.json").write_text(json.dumps(config | changes))


def _safetensors(names: list[str]) -> bytes:
    size = 4 * WIDTH * WIDTH
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": [WIDTH, WIDTH], "data_offsets": [index * size, (index + 1) * size]}
            for index, name in enumerate(names)
        }
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size * len(names))


def _recipe(old: str, new: str) -> Callable[[Path], None]:
    def change(here: Path) -> None:
        text = (here / "tiny.yaml").read_text()
        assert old in text
        (here / "tiny.yaml").write_text(text.replace(old, new))

    return change


def _file(name: str, content: str) -> Callable[[Path], None]:
    return lambda here: void((here / name).write_text(content))


def _no_file(name: str) -> Callable[[Path], None]:
    return lambda here: (here / name).unlink()


def void(_: object) -> None:
    """A value that nobody wants."""


def _no_json_on_line_3(here: Path) -> None:
    lines = list(rows())
    lines[2] = "{'question': 'why?'}\n"
    (here / "rows.jsonl").write_text("".join(lines))


def _fewer_layers_than_ranks(here: Path) -> None:
    _write_config(here / "model", num_hidden_layers=1)


def _truncated(here: Path) -> None:
    path = here / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _index_names_an_absent_file(here: Path) -> None:
    (here / "model" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.layers.0.weight": "model-00001-of-00002.safetensors"}})
    )


# name: (what is wrong, what standard error must say)
WRONG: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "unknown key": (_recipe("lora_r: 4", "lora_rr: 4"), ("tiny.yaml:7: lora_rr", "did you mean lora_r")),
    "wrong type": (_recipe("max_steps: 12", "max_steps: many"), ("tiny.yaml:11: max_steps", "whole number")),
    "no such recipe": (_no_file("tiny.yaml"), ("tiny.yaml", "no such")),
    "missing dataset": (_no_file("rows.jsonl"), ("tiny.yaml:4: datasets.0.path", "rows.jsonl")),
    "empty dataset": (_file("rows.jsonl", ""), ("rows.jsonl: the dataset is empty",)),
    "a line is no JSON": (_no_json_on_line_3, ("rows.jsonl:3: no JSON",)),
    "a line lacks its answer": (_file("rows.jsonl", '{"question": "why?"}\n'), ("rows.jsonl:1: answer: is missing",)),
    "no model": (_recipe("./model", "./modell"), ("tiny.yaml:3: base_model", "modell")),
    "no config.json": (_no_file("model/config.json"), ("/model: no config.json",)),
    "config.json is no JSON": (_file("model/config.json", "{"), ("config.json: cannot be read",)),
    "no tokenizer": (_no_file("model/tokenizer.json"), ("/model: no tokenizer",)),
    "no safetensors": (_no_file("model/model.safetensors"), ("/model: no model.safetensors",)),
    "truncated safetensors": (_truncated, ("model.safetensors: cut short", "download the model again")),
    "an index names an absent file": (_index_names_an_absent_file, ("names model-00001-of-00002.safetensors",)),
    "too long for the model": (_recipe("sequence_len: 64", "sequence_len: 129"), ("tiny.yaml:8: sequence_len", "128")),
    "fewer layers than ranks": (_fewer_layers_than_ranks, ("1 layer, fewer than the 2 ranks", "nodes: 1")),
    "no such node": (_recipe("name: tiny", "nodes: lfet"), ("tiny.yaml:2: nodes", "lfet", "left, right")),
    "wrong inventory": (
        _file("pair.yaml", INVENTORY.replace("transport: local", "transprot: local", 1)),
        ("pair.yaml:3: nodes.0.transprot",),
    ),
    "inventory with one node": (
        _file("pair.yaml", "nodes:\n- {name: left, transport: local}\n"),
        ("pair.yaml:1: nodes",),
    ),
}
REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "zero3": (_recipe("strategy: pipeline", "strategy: zero3"), ("strategy: zero3", "strategy: pipeline")),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_told_and_nothing_is_made(case: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, expected = WRONG[case]
    change(here)
    _check(here, capfd, status=2, expected=expected)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_refused_and_nothing_is_made(
    case: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, expected = REFUSED[case]
    change(here)
    _check(here, capfd, status=3, expected=expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_stepz=3", ("--set max_stepz=3: max_stepz", "did you mean max_steps")),
        ("max_steps=0", ("--set max_steps=0: max_steps",)),
        ("sequence_len=4096", ("--set sequence_len=4096: sequence_len", "128")),
        ("nonsense", ("--set nonsense",)),
    ],
)
def test_a_wrong_override_is_told_like_a_wrong_line(
    override: str, expected: tuple[str, ...], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _check(here, capfd, "--set", override, status=2, expected=expected)


def test_the_same_folder_without_a_fault_is_planned(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "tiny.yaml", "--json"])
    assert ended.value.code == 0
    document = json.loads(capfd.readouterr().out)
    assert [(rank["node"], rank["start"], rank["end"]) for rank in document["ranks"]] == [
        ("left", 0, 2),
        ("right", 2, 4),
    ]
    assert document["embedded"] is True


def _check(
    here: Path, capfd: pytest.CaptureFixture[str], *options: str, status: int, expected: tuple[str, ...]
) -> None:
    before = psutil.Process().children(recursive=True)
    for verb in (["plan"], ["run"], ["run", "--detach", "--json"]):
        if status == 3 and "kind: command" not in (here / "tiny.yaml").read_text() and verb == ["plan"]:
            continue  # planned like any other; only to start it is refused
        with pytest.raises(SystemExit) as ended:
            main([*verb, "tiny.yaml", *options])
        out, err = capfd.readouterr()
        assert ended.value.code == status, err
        assert out == ""
        assert err.startswith("error: ")
        assert len(err.splitlines()) <= 2
        assert all(words in err for words in expected), err
    assert psutil.Process().children(recursive=True) == before
    assert not list(here.glob("home/jobs/*"))
