"""recipe.yaml: three kinds, every key with a default and a bound, and one line for whatever is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.errors import WrongInputError
from launch import recipe
from launch.recipe import CommandRecipe, FinetuneRecipe, InferenceRecipe, Recipe

FINETUNE = "kind: finetune\nbase_model: org/model\ndatasets:\n  - {path: org/data, type: qa}\n"
INFERENCE = "kind: inference\nbase_model: org/model\n"
COMMAND = "kind: command\ncommand: [run, it]\n"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)


def load(text: str, *overrides: str, **options: bool) -> Recipe:
    Path("mine.yaml").write_text(text)
    return recipe.load(Path("mine.yaml"), overrides, **options)


def finetune(text: str = "", *overrides: str) -> FinetuneRecipe:
    loaded = load(FINETUNE + text, *overrides)
    assert isinstance(loaded, FinetuneRecipe)
    return loaded


def command(text: str) -> CommandRecipe:
    loaded = load("kind: command\n" + text)
    assert isinstance(loaded, CommandRecipe)
    return loaded


def complaint(text: str, *overrides: str, **options: bool) -> WrongInputError:
    with pytest.raises(WrongInputError) as caught:
        load(text, *overrides, **options)
    assert "\n" not in caught.value.message + caught.value.fix
    return caught.value


def test_a_finetune_needs_a_model_and_data_and_has_the_documented_defaults() -> None:
    dump = finetune().model_dump(mode="json", exclude={"base_model", "datasets"})
    assert dump == {
        "kind": "finetune", "name": "mine", "nodes": 2, "restart": {"max": 3, "backoff": 10.0}, "val_set_size": 0,
        "skip_bad_rows": False,
        "adapter": "lora", "strategy": "auto", "quantize_moe_experts": True,
        "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_linear": None, "lora_target_modules": None,
        "sequence_len": 2048, "sample_packing": False, "micro_batch_size": 1, "gradient_accumulation_steps": 8,
        "num_epochs": 1.0, "max_steps": None, "learning_rate": 2e-4, "lr_scheduler": "cosine", "warmup_ratio": 0.03,
        "weight_decay": 0.0, "optimizer": "adamw_torch", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0, "bf16": "auto", "gradient_checkpointing": True, "seed": 42, "output_dir": None,
        "logging_steps": 1, "save_steps": None, "save_total_limit": 2, "eval_steps": None, "resume_from_checkpoint": None,
    }  # fmt: skip


def test_an_inference_recipe_listens_on_loopback_unless_told_otherwise() -> None:
    served = load(INFERENCE)
    assert isinstance(served, InferenceRecipe)
    assert served.model_dump(mode="json", exclude={"restart"}) == {
        "kind": "inference", "name": "mine", "nodes": 2, "base_model": "org/model", "strategy": "pipeline",
        "quantization": None, "adapter_path": None, "adapter_from": None, "max_model_len": 4096, "max_num_seqs": 8,
        "max_num_batched_tokens": 2048, "served_model_name": None, "host": "127.0.0.1", "port": 8000, "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("num_epochs: 3", "num_epochs", 3.0),
        ("val_set_size: 0.1", "val_set_size", 0.1),
        ("val_set_size: 10", "val_set_size", 10),
        ("bf16: true", "bf16", True),
        ("bf16: auto", "bf16", "auto"),
        ("nodes: 1", "nodes", 1),
        ("nodes: spark-a", "nodes", "spark-a"),
        ("name: no", "name", "no"),
        ("max_steps:", "max_steps", None),
        ("lora_target_modules: [q_proj, v_proj]", "lora_target_modules", ("q_proj", "v_proj")),
        ("resume_from_checkpoint: auto", "resume_from_checkpoint", "auto"),
        ("max_grad_norm: 0", "max_grad_norm", 0.0),
        # Hugging Face's spellings
        ("max_seq_length: 64", "sequence_len", 64),
        ("max_length: 64", "sequence_len", 64),
        ("per_device_train_batch_size: 4", "micro_batch_size", 4),
        ("num_train_epochs: 2", "num_epochs", 2.0),
        ("lr_scheduler_type: linear", "lr_scheduler", "linear"),
        ("packing: true", "sample_packing", True),
        ("optim: adafactor", "optimizer", "adafactor"),
        ("r: 4", "lora_r", 4),
        ("lora_rank: 4", "lora_r", 4),
        ("target_modules: [q_proj]", "lora_target_modules", ("q_proj",)),
        ("target_modules: all-linear", "lora_target_modules", None),
    ],
)
def test_keys_and_their_other_spellings_are_taken(text: str, key: str, value: object) -> None:
    assert (getattr(finetune(text), key), type(getattr(finetune(text), key))) == (value, type(value))


@pytest.mark.parametrize("key", ["base_model", "model_name_or_path", "model"])
@pytest.mark.parametrize("text", [FINETUNE, INFERENCE])
def test_the_model_may_be_named_as_each_library_names_it(text: str, key: str) -> None:
    assert load(text.replace("base_model", key)).base_model == "org/model"


@pytest.mark.parametrize(
    ("given", "seconds"), [("10s", 10), ("2m", 120), ("1h", 3600), ("500ms", 0.5), ("7", 7), ("0", 0), ("1.5s", 1.5)]
)
def test_durations_are_written_with_their_unit_or_in_seconds(given: str, seconds: float) -> None:
    assert finetune(f"restart: {{backoff: {given}}}").restart.backoff == seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rr: 3", "lora_rr: unknown key; did you mean lora_r?"),
        ("learning-rate: 3", "learning-rate: unknown key; did you mean learning_rate?"),
        ("max_lenght: 3", "max_lenght: unknown key; did you mean max_length?"),
        ("model: x", "model: means the same as base_model, which is given too; keep one"),
        ("sequence_len: 512\nmax_length: 512", "max_length: means the same as sequence_len, which is given too; keep one"),
        ("learning_rate: yes", "learning_rate: must be a number, not 'yes'"),
        ("learning_rate: true", "learning_rate: must be a number, not true"),
        ("learning_rate: 0", "learning_rate: must be above 0, not 0"),
        ("learning_rate: 2", "learning_rate: must be at most 1, not 2"),
        ("learning_rate: .nan", "learning_rate: must be a finite number, not NaN"),
        ("lora_dropout: 1", "lora_dropout: must be below 1, not 1"),
        ("warmup_ratio: 1.5", "warmup_ratio: must be at most 1, not 1.5"),
        ("micro_batch_size: two", "micro_batch_size: must be a whole number, not 'two'"),
        ("micro_batch_size: 0", "micro_batch_size: must be at least 1, not 0"),
        ("sequence_len: 7", "sequence_len: must be at least 8, not 7"),
        ("lora_r: 0", "lora_r: must be at least 1, not 0"),
        ("lora_r:", "lora_r: is empty"),
        ("num_epochs: 0", "num_epochs: must be above 0, not 0"),
        ("max_steps: 0", "max_steps: must be at least 1, not 0"),
        ("seed: -1", "seed: must be at least 0, not -1"),
        ("seed: 4294967296", "seed: must be below 4294967296, not 4294967296"),
        ("val_set_size: 1.0", "val_set_size: must be a fraction below 1 or a whole number of rows, not 1.0"),
        ("val_set_size: -1", "val_set_size: must be a fraction below 1 or a whole number of rows, not -1"),
        ("val_set_size: true", "val_set_size: must be a fraction below 1 or a whole number of rows, not true"),
        ("adapter: qlra", "adapter: must be qlora, lora or full, not 'qlra'; did you mean qlora?"),
        ("optim: adamw_torhc",
         "optim: must be adamw_torch, adamw_8bit or adafactor, not 'adamw_torhc'; did you mean adamw_torch?"),
        ("bf16: yes", "bf16: must be auto, true or false, not 'yes'"),
        ("bf16: 1", "bf16: must be auto, true or false, not 1"),
        ("sample_packing: on", "sample_packing: must be true or false, not 'on'; did you mean true?"),
        ("nodes: 3", "nodes: must be 2, 1 or a node's name, not 3"),
        ("nodes: true", "nodes: must be 2, 1 or a node's name, not true"),
        ("nodes: ../x", "nodes: must be 2, 1 or a node's name, not '../x'"),
        ("name: ../x",
         "name: must be 1 to 63 letters, digits, '-', '_' or '.', and start with a letter or digit, not '../x'"),
        ("restart: {max: -1}", "restart.max: must be at least 0, not -1"),
        ("restart: {backof: 2m}", "restart.backof: unknown key; did you mean backoff?"),
        ("restart: {backoff: 2 days}",
         "restart.backoff: must be a duration up to 24h such as 10s or 2m, not '2 days'"),
        ("restart: {backoff: 25h}", "restart.backoff: must be a duration up to 24h such as 10s or 2m, not '25h'"),
        ("restart: {backoff: true}", "restart.backoff: must be a duration up to 24h such as 10s or 2m, not true"),
        ("lora_target_modules: q_proj", "lora_target_modules: must be a list, not 'q_proj'"),
        ("target_modules: []", "target_modules: must have at least one entry"),
        ("lora_target_linear: true\ntarget_modules: [q]", "target_modules: excludes lora_target_linear: true; keep one"),
        ("lora_target_linear: false",
         "lora_target_linear: leaves adapter: lora nothing to train; name lora_target_modules"),
        ("eval_steps: 10", "eval_steps: has nothing to evaluate on; give val_set_size, such as 0.05"),
        ("output_dir: ''", "output_dir: must be one line of text, not ''"),
        ("resume_from_checkpoint: -x", "resume_from_checkpoint: must not start with '-', not '-x'"),
    ],
)  # fmt: skip
def test_a_wrong_finetune_key_is_refused_in_one_line(text: str, message: str) -> None:
    line = 5 + text.count("\n")
    assert complaint(FINETUNE + text + "\n").message == f"mine.yaml:{line}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "1: kind: is missing"),
        ("kind: train\n", "1: kind: must be finetune, inference or command, not 'train'"),
        ("kind: fintune\n", "1: kind: must be finetune, inference or command, not 'fintune'; did you mean finetune?"),
        ("kind: [a]\n", "1: kind: must be finetune, inference or command, not a list"),
        ("kind: inference\n", "1: base_model: is missing"),
        ("kind: inference\nbase_model: --x\n", "2: base_model: must not start with '-', not '--x'"),
        ("kind: finetune\nbase_model: x\n", "1: datasets: is missing"),
        ("kind: finetune\nbase_model: x\ndatasets: []\n", "3: datasets: must have at least one entry"),
        ("kind: finetune\nbase_model: x\ndatasets: a.jsonl\n", "3: datasets: must be a list, not 'a.jsonl'"),
        ("kind: finetune\nbase_model: x\ndatasets:\n  - path: a\n", "4: datasets.0.type: is missing"),
        ("kind: finetune\nbase_model: x\ndatasets:\n  - path: a\n    type: sharegpt\n",
         "5: datasets.0.type: must be chat_template, alpaca, completion or qa, not 'sharegpt'"),
        ("kind: finetune\nbase_model: x\ndatasets:\n  - path: a\n    typ: qa\n",
         "5: datasets.0.typ: unknown key; did you mean type?"),
        (INFERENCE + "max_num_batched_tokens: 4\n",
         "3: max_num_batched_tokens: must be at least max_num_seqs (8), not 4"),
        (INFERENCE + "adapter_path: a\nadapter_from: b\n", "4: adapter_from: excludes adapter_path; keep one"),
        (INFERENCE + "quantization: fp8\n", "3: quantization: must be nf4, not 'fp8'"),
        (INFERENCE + "strategy: zero3\n", "3: strategy: must be pipeline, not 'zero3'"),
        (INFERENCE + "port: 65536\n", "3: port: must be at most 65535, not 65536"),
        (INFERENCE + "host: example.org\n", "3: host: must be an address such as 127.0.0.1, not 'example.org'"),
        (INFERENCE + "host: 0.0.0.0\n",
         "3: host: must be one address, not 0.0.0.0, which opens the model to every network; use `sparkctl tunnel`"),
        ("kind: command\n", "1: command: is missing"),
        ("kind: command\ncommand: ''\n", "2: command: must be a program and its arguments, not empty"),
        ("kind: command\ncommand: 3\n", "2: command: must be a program and its arguments, not 3"),
        ("kind: command\ncommand: a 'b\n", "2: command: cannot be split as a shell would (no closing quotation)"),
        ("kind: command\ncommand: [a, {node_rank}]\n", "2: command: entry 2 must be in quotes: '{node_rank}'"),
        ("kind: command\ncommand: [a, true]\n",
         "2: command: entry 2 must be text or a number, not true; put it in quotes"),
        ("kind: command\ncommand: {}\n", "2: command: must give head, peer or both something to run"),
        ("kind: command\ncommand: {haed: a}\n", "2: command.haed: unknown key; did you mean head?"),
        ("kind: command\ncommand: {head: a, peer: []}\n",
         "2: command: peer: must be a program and its arguments, not empty"),
        ("kind: command\ncommand: serve {model}\n", "2: command: uses {model}, but the recipe has no model"),
        (COMMAND + "env: {A-B: x}\n", "3: env.A-B: must be letters, digits and '_', to be an environment variable's name"),
        (COMMAND + "ports: [80, x]\n", "3: ports.1: must be a whole number, not 'x'"),
        (COMMAND + "ports: [80, 80]\n", "3: ports: must not name a port twice"),
        (COMMAND + "ready: '['\n",
         "3: ready: must be an http URL or a regular expression, not '[' (unterminated character set at position 0)"),
        (COMMAND + "image: a b\n", "3: image: must be a container image's name, not 'a b'"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_of_any_kind_is_refused_in_one_line(text: str, message: str) -> None:
    assert complaint(text).message == f"mine.yaml:{message}"


def test_switching_the_adapter_or_the_nodes_needs_no_other_change() -> None:
    tuned = finetune("lora_r: 4\nlora_target_linear: false\nstrategy: zero3\n", "adapter=full", "nodes=1")
    assert (tuned.adapter, tuned.nodes) == ("full", 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=fast", "--set learning_rate=fast: learning_rate: must be a number, not 'fast'"),
        ("learning_rte=1", "--set learning_rte=1: learning_rte: unknown key; did you mean learning_rate?"),
        ("kind=train", "--set kind=train: kind: must be finetune, inference or command, not 'train'"),
        ("datasets.0.type=q", "--set datasets.0.type=q: datasets.0.type: must be chat_template"),
        ("eval_steps=3", "--set eval_steps=3: eval_steps: has nothing to evaluate on"),
    ],
)
def test_overrides_are_checked_like_the_file(override: str, message: str) -> None:
    assert complaint(FINETUNE, override).message.startswith(message)


def test_an_override_replaces_the_key_under_whatever_name_the_file_uses() -> None:
    assert finetune("max_length: 64", "sequence_len=128").sequence_len == 128
    assert finetune("sequence_len: 64", "max_seq_length=128").sequence_len == 128
    assert finetune("restart: {max: 1, backoff: 1m}", "restart.max=0").restart.model_dump() == {
        "max": 0,
        "backoff": 60.0,
    }
    assert finetune("lora_r: 4", "lora_r=null").lora_r == 16


@pytest.mark.parametrize(
    ("stem", "name"), [("tune", "tune"), ("my recipe (1)", "my-recipe-1"), ("...", "recipe"), ("x" * 90, "x" * 63)]
)
def test_a_recipe_without_a_name_is_called_like_its_file(stem: str, name: str) -> None:
    path = Path(f"{stem}.yaml")
    path.write_text(INFERENCE)
    assert recipe.load(path).name == name


@pytest.mark.parametrize(
    ("written", "head", "peer"),
    [
        ("serve '{model}' --port 80", ("serve", "{model}", "--port", "80"), ("serve", "{model}", "--port", "80")),
        ("[serve, a b, 3, 0.5, '{node_rank}']", ("serve", "a b", "3", "0.5", "{node_rank}"),
         ("serve", "a b", "3", "0.5", "{node_rank}")),
        ("{head: serve x, peer: [join, 1]}", ("serve", "x"), ("join", "1")),
        ("{peer: join}", None, ("join",)),
    ],
)  # fmt: skip
def test_a_command_is_an_argv_for_each_side(written: str, head: Any, peer: Any) -> None:
    sides = command(f"command: {written}\nmodel: org/model\n").command
    assert (sides.head, sides.peer) == (head, peer)


def test_a_command_has_an_environment_ports_a_sign_that_it_is_ready_and_an_image() -> None:
    run = command(
        "command: run\nenv: {N: 1, HF_TOKEN: hunter2}\nports: [80, 81]\n"
        "ready: http://127.0.0.1:80/health\nimage: nvcr.io/x:1\n"
    )
    assert (run.env, run.ports, run.image) == ({"N": "1", "HF_TOKEN": "hunter2"}, (80, 81), "nvcr.io/x:1")
    assert run.ready == "http://127.0.0.1:80/health"
    assert command("command: run\nready: 'Uvicorn running on .*'\n").ready == "Uvicorn running on .*"
    assert "hunter2" not in repr(run)


class TestPaths:
    """A recipe's folder is where its paths start, so that the two can be moved together; what is typed starts here."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "recipes"
        folder.mkdir()
        (folder / "recipe.yaml").write_text("kind: finetune\nbase_model: MODEL\ndatasets: [{path: DATA, type: qa}]\n")
        return folder

    @staticmethod
    def load(folder: Path, model: str, data: str, *overrides: str, **options: bool) -> FinetuneRecipe:
        text = (folder / "recipe.yaml").read_text().replace("MODEL", model).replace("DATA", data)
        (folder / "recipe.yaml").write_text(text)
        loaded = recipe.load(Path(os.path.relpath(folder / "recipe.yaml")), overrides, **options)
        assert isinstance(loaded, FinetuneRecipe)
        return loaded

    def test_what_lies_beside_the_recipe_wins_over_the_current_folder(self, folder: Path) -> None:
        (folder / "model").mkdir()
        for place in (folder, Path()):
            (place / "rows.jsonl").touch()
        loaded = self.load(folder, "./model", "rows.jsonl", must_exist=True)
        assert (loaded.base_model, loaded.datasets[0].path) == (str(folder / "model"), str(folder / "rows.jsonl"))

    def test_what_lies_only_in_the_current_folder_is_found_there(self, folder: Path) -> None:
        Path("rows.jsonl").touch()
        assert self.load(folder, "org/model", "./rows.jsonl").datasets[0].path == str(Path.cwd() / "rows.jsonl")

    def test_what_is_set_on_the_command_line_starts_in_the_current_folder(self, folder: Path) -> None:
        for place in (folder, Path()):
            (place / "rows.jsonl").touch()
        loaded = self.load(folder, "org/model", "x", "datasets.0.path=rows.jsonl")
        assert loaded.datasets[0].path == str(Path.cwd() / "rows.jsonl")

    def test_a_hub_id_stays_one_and_a_folder_of_that_name_wins(self, folder: Path) -> None:
        assert self.load(folder, "org/model", "org/data").base_model == "org/model"
        (folder / "org/model").mkdir(parents=True)
        assert self.load(folder, "org/model", "org/data").base_model == str(folder / "org/model")

    def test_absolute_paths_and_the_home_folder_are_taken_as_they_are(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", "/home/someone")
        loaded = self.load(folder, "/models/m", "~/rows.jsonl")
        assert (loaded.base_model, loaded.datasets[0].path) == ("/models/m", "/home/someone/rows.jsonl")

    def test_a_linked_file_keeps_the_ending_that_says_what_it_is(self, folder: Path) -> None:
        (folder / "blob").touch()
        (folder / "rows.jsonl").symlink_to("blob")
        assert self.load(folder, "org/model", "rows.jsonl").datasets[0].path == str(folder / "rows.jsonl")

    def test_the_output_goes_where_the_command_runs(self, folder: Path) -> None:
        assert self.load(folder, "org/model", "org/data", "output_dir=out").output_dir == str(Path.cwd() / "out")

    @pytest.mark.parametrize("data", ["./rows", "../rows.jsonl", "rows.jsonl", "~/none/rows", "~nobody-here/rows.csv"])
    def test_a_missing_dataset_is_named_by_its_line_when_it_must_exist(self, folder: Path, data: str) -> None:
        self.load(folder, "org/model", data)  # ready recipes are listed before their data is made
        with pytest.raises(WrongInputError) as caught:
            self.load(folder, "org/model", data, must_exist=True)
        assert caught.value.message == f"../recipes/recipe.yaml:3: datasets.0.path: no such file or folder: {data}"
        assert data.startswith("~") or str(folder) in caught.value.fix

    def test_a_missing_model_is_named_in_the_file_s_spelling(self, folder: Path) -> None:
        text = (folder / "recipe.yaml").read_text().replace("base_model", "model_name_or_path")
        (folder / "recipe.yaml").write_text(text)
        with pytest.raises(WrongInputError) as caught:
            self.load(folder, "./model", "org/data", must_exist=True)
        assert caught.value.message == "../recipes/recipe.yaml:2: model_name_or_path: no such file or folder: ./model"


@pytest.mark.parametrize(
    "text",
    [
        FINETUNE
        + "target_modules: [q]\nval_set_size: 0.1\nnum_epochs: 3\nbf16: false\nnodes: a\nrestart: {backoff: 1m}\n",
        FINETUNE + "target_modules: all-linear\nval_set_size: 3\nmax_steps: 4\n",
        INFERENCE + "quantization: nf4\nport: 0\nhost: localhost\nadapter_from: job-1\n",
        "kind: command\ncommand: {peer: [a, 1]}\nenv: {A: 1}\nports: [1]\nready: x\n",
    ],
)
def test_a_dump_gives_the_same_recipe_back(text: str) -> None:
    loaded = load(text)
    assert recipe.parse_dump(loaded.model_dump(mode="json")) == loaded


def test_a_damaged_dump_is_an_error_of_ours() -> None:
    with pytest.raises(WrongInputError) as caught:
        recipe.parse_dump({"kind": "inference", "base_model": 3})
    assert caught.value.message == "spec.json: base_model: must be text, not 3"


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError):
        finetune().seed = 3  # type: ignore[misc]


def test_the_json_schema_describes_every_key_under_every_spelling() -> None:
    schema = recipe.json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert [entry["$ref"].rpartition("/")[2] for entry in schema["oneOf"]] == [
        "FinetuneRecipe",
        "InferenceRecipe",
        "CommandRecipe",
    ]
    for definition in schema["$defs"].values():
        assert definition["additionalProperties"] is False
        for key, entry in definition["properties"].items():
            assert entry["description"].endswith("."), key
    tune = schema["$defs"]["FinetuneRecipe"]
    assert {"sequence_len", "max_length", "max_seq_length", "r", "optim", "packing"} <= set(tune["properties"])
    assert tune["properties"]["max_length"]["minimum"] == 8
    assert tune["properties"]["lr_scheduler_type"]["enum"] == ["cosine", "linear", "constant"]
    assert set(tune["required"]) == {"kind", "datasets"}
    assert {"required": ["model_name_or_path"]} in tune["allOf"][0]["anyOf"], "a spelling satisfies a required key"
    assert [schema["$defs"][name]["properties"]["kind"]["const"] for name in ("InferenceRecipe", "CommandRecipe")] == [
        "inference",
        "command",
    ]


def test_reading_a_recipe_loads_neither_torch_nor_fabric() -> None:
    code = (
        "import sys, launch.recipe, cluster.inventory;"
        "print([name for name in ('torch', 'transformers', 'fabric', 'numpy', 'rich') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
