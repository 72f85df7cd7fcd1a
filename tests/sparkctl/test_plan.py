"""`plan`, as a person and as a program sees it; and `run`, which refuses what it says does not fit."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from sparkctl.cli import main
from tests.commandline import INVENTORY, rows
from tests.launch.loopback_hub import Hub, serving
from tests.launch.plans import CONFIGS

SPARKS = "nodes:\n- {name: spark-a, host: 192.0.2.1}\n- {name: spark-b, host: 192.0.2.2}\n"
SERVE = "kind: inference\nbase_model: ./model\nquantization: nf4\nmax_model_len: 4096\nmax_num_seqs: 4\n"
TUNE = (
    "kind: finetune\nbase_model: ./model\nadapter: qlora\nsequence_len: 512\ndatasets: [{path: rows.jsonl, type: qa}]\n"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two Sparks in its inventory, recipes, and no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPARKCTL_INVENTORY", str(tmp_path / "pair.yaml"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "pair.yaml").write_text(SPARKS)
    (tmp_path / "serve.yaml").write_text(SERVE)
    (tmp_path / "tune.yaml").write_text(TUNE)
    (tmp_path / "rows.jsonl").write_text("".join(rows()))
    return tmp_path


def _model(here: Path, name: str) -> None:
    (here / "model").mkdir(exist_ok=True)
    shutil.copy(CONFIGS / f"{name}.json", here / "model" / "config.json")


def _call(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code, *capfd.readouterr()


def test_a_model_is_planned_before_it_is_there(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _model(here, "llama-3.1-405b")
    status, out, err = _call(capfd, "plan", "serve.yaml")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[:3] == [
        "pair: spark-a (rank 0) and spark-b (rank 1)",
        "model: 405.9 B parameters, 126 layers, 756 GiB as stored",
        "serve 4 sequences of up to 4,096 tokens, pipeline over 2 nodes",
    ]
    assert not any(line != line.rstrip() for line in lines)
    assert re.search(r"^\S? +holds +embedding \+ layers 0-62 +layers 63-125 \+ head$", out, re.MULTILINE)
    assert re.search(r"^█ weights +100\.4 GiB +100\.4 GiB$", out, re.MULTILINE)
    assert re.search(r"^ +usable +109\.7 GiB of 121\.7 +109\.7 GiB of 121\.7$", out, re.MULTILINE)
    assert re.search(r"^ +fits, \d+ MiB to spare +fits, \d+ MiB to spare$", out, re.MULTILINE)
    assert re.search(r"^  decode +[\d.]+ tokens/s for one sequence alone$", out, re.MULTILINE)
    assert re.search(r"^room for +max_model_len: \d+, or max_num_seqs: 4$", out, re.MULTILINE)
    assert "sizes: from config.json, the weights are not there" in out


def test_what_does_not_fit_is_shown_and_is_status_3(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _model(here, "deepseek-v3")
    status, out, err = _call(capfd, "plan", "serve.yaml")
    assert (status, err) == (3, "")
    assert re.search(r"^ +57\.\d GiB too much +56\.\d GiB too much$", out, re.MULTILINE)
    assert "as a rule 2 such nodes hold 418.1 B in 4 bits" in out
    _model(here, "llama-3.1-405b")
    status, out, _ = _call(capfd, "plan", "serve.yaml", "--set", "max_model_len=8192")
    assert status == 3
    assert re.search(r"^would fit +max_model_len: 4480\n +max_num_seqs: 2$", out, re.MULTILINE)


def test_a_program_gets_all_of_it(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _model(here, "qwen3-235b-a22b")
    status, out, _ = _call(capfd, "plan", "serve.yaml", "--json")
    assert status == 0
    document = json.loads(out)
    assert (document["parameters"], document["fits"], document["has_weights"]) == (235093634560, True, False)
    assert 21e9 < document["active_parameters"] < 23e9
    assert len(document["layers"]) == 94
    assert document["layers"][0]["cache"] == {"per_token": 1024, "window": None, "conv": 0, "recurrent": 0}
    assert document["bytes"] == 2 * document["parameters"]
    for rank in document["ranks"]:
        assert rank["needed"] == sum(rank["memory"].values()) == rank["usable"] - rank["headroom"]
        assert rank["weight_bytes"] == rank["memory"]["weights"]
        assert rank["box"] == {"total": 127600748 * 1024, "available": None, "about": "a DGX Spark"}
    held = document["embedding_bytes"] + document["head_bytes"] + sum(layer["held"] for layer in document["layers"])
    assert sum(rank["weight_bytes"] for rank in document["ranks"]) == held
    assert set(document["predicted"]) == {"one", "full", "prefill", "load"}
    assert [list(way) for way in document["ways"]] == [["max_model_len"], ["max_num_seqs"]]
    status, out, _ = _call(capfd, "plan", "tune.yaml", "--json")
    assert (status, set(json.loads(out)["predicted"])) == (0, {"step", "tokens", "load"})


def test_other_boxes_may_be_asked_about(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "pair.yaml").write_text(INVENTORY)  # not even an inventory of Sparks is needed
    _model(here, "gpt-oss-120b")
    for gib, fits in (("24", False), ("64", True)):
        status, out, _ = _call(capfd, "plan", "serve.yaml", "--memory", gib)
        assert status == (0 if fits else 3)
        assert out.startswith(f"asked about: boxes of {gib} GiB, 2 of them, not the pair\n")
        assert "tokens/s for one sequence alone" in out
    assert _call(capfd, "plan", "serve.yaml", "--memory", "0")[0] == 2


def test_the_embedded_pair_is_this_machine_of_whose_speed_nothing_is_said(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "pair.yaml").write_text(INVENTORY)
    _model(here, "llama-3.1-405b")
    status, out, _ = _call(capfd, "plan", "serve.yaml")
    assert status == 3
    assert out.startswith("embedded pair: two ranks on this machine")
    assert "not predicted: nothing is known of this machine's; `--memory 121.7` plans for two DGX Sparks" in out
    assert "shared by 2 ranks" in out


def test_what_cannot_be_run_yet_can_be_planned(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _model(here, "deepseek-r1-distill-qwen-32b")
    status, out, _ = _call(capfd, "plan", "tune.yaml")
    assert status == 0
    assert "LoRA of rank 16, 8 micro-batches of 1 x 512 tokens a step, ddp over 2 nodes" in out
    assert re.search(r"^strategy +ddp: the model fits one node", out, re.MULTILINE)
    assert re.search(r"^  pipeline +\d+ s a step$", out, re.MULTILINE)
    assert re.search(r"^  step +\d+ s, \d+ tokens/s$", out, re.MULTILINE)
    absent = ("--set", "strategy=zero3", "--set", "adapter=lora")
    assert _call(capfd, "plan", "tune.yaml", *absent)[0] == 0
    assert _call(capfd, "run", "tune.yaml", *absent)[0] == 3
    status, out, _ = _call(capfd, "plan", "tune.yaml", "--set", "strategy=fsdp2", "--set", "adapter=lora")
    assert (status, "a share of everything" in out) == (0, True)
    status, out, _ = _call(capfd, "plan", "tune.yaml", "--set", "nodes=spark-b")
    assert (status, "whole on one node" in out) == (0, True)
    assert re.search(r"^memory +spark-b \(rank 0\)$", out, re.MULTILINE)


def test_quiet_says_it_by_its_status(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _model(here, "deepseek-v3")
    assert _call(capfd, "plan", "serve.yaml", "-q") == (3, "", "")
    _model(here, "llama-3.1-8b")
    assert _call(capfd, "plan", "serve.yaml", "-q") == (0, "", "")


def test_run_refuses_what_does_not_fit_and_makes_nothing(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "pair.yaml").write_text(INVENTORY)
    _model(here, "llama-3.1-405b")
    _pretend_weights(here / "model", layers=126, width=16384)
    recipe = ("tune.yaml", "--set", "adapter=lora")
    status, out, err = _call(capfd, "run", *recipe)
    assert (status, out) == (3, "")
    message, fix = err.splitlines()
    assert re.fullmatch(
        r"error: tune: does not fit: rank \d needs [\d.]+ GiB on \w+, where [\d.]+ GiB can be used( now)?", message
    )
    assert fix.startswith("  try: ")
    assert not (here / "home").exists()
    assert _call(capfd, "run", "--dry-run", *recipe)[0] == 3
    assert _call(capfd, "plan", *recipe)[0] == 3


def _pretend_weights(model: Path, *, layers: int, width: int) -> None:
    """A safetensors file whose header is true and whose tensors are a hole in the disk."""
    size = 2 * width * width
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(layers)]
    entries = {
        name: {"dtype": "BF16", "shape": [width, width], "data_offsets": [index * size, (index + 1) * size]}
        for index, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(model / "model.safetensors", 8 + len(header) + size * len(names))
    (model / "tokenizer.json").write_text("{}")


def test_a_model_on_the_hub_is_planned_from_there(here: Path) -> None:
    _model(here, "llama-3.1-8b")
    hub = Hub({"org/model": here / "model"}, {"org/gated": 403})
    with serving(hub):
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment["HF_ENDPOINT"] = hub.endpoint
        done = _sparkctl("plan", "serve.yaml", "--set", "base_model=org/model", env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert "model: 8.03 B parameters, 32 layers" in done.stdout
        done = _sparkctl("plan", "serve.yaml", "--set", "base_model=org/gated", env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: org/gated: the hub answers 403: its licence has to be accepted first, by the account that asks\n"
        f"  try: accept it at {hub.endpoint}/org/gated, then `hf auth login` or set HF_TOKEN\n"
    )


def _sparkctl(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "sparkctl", *arguments]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)


_WITHOUT = """
import sys
from sparkctl.cli import main
try:
    main(["plan", "serve.yaml", "-q"])
finally:
    heavy = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "fabric", "paramiko"} & set(sys.modules)
    print(*heavy)
"""


def test_a_plan_imports_nothing_heavy(here: Path) -> None:
    """What it takes in seconds is tests/benchmarks/start.py's to tell."""
    _model(here, "llama-3.1-405b")
    done = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("recipe", ["serve.yaml", "tune.yaml"])
@pytest.mark.parametrize("model", ["llama-3.1-405b", "deepseek-v3"])
def test_it_fits_the_terminal(columns: int, recipe: str, model: str, here: Path) -> None:
    _model(here, model)
    shown = _in_terminal(columns, "plan", recipe)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    lines = [line.rstrip() for line in plain.replace("\r", "").splitlines()]
    assert max(map(len, lines)) <= columns
    assert "\x1b[1;32mfits" in shown or "\x1b[1;31m" in shown
    table = lines[lines.index("") + 1 :]
    table = table[: table.index("")]
    # A label on each line but those of the bars and verdicts: no cell was broken.
    assert [line[:17].strip() for line in table if not line[:17].strip()] == ["", ""]
    bars = [line.split() for line in table if set(line) & set("░│") or line.strip("█ ") == ""]
    assert [len(bar) for bar in bars[0]] == [24, 24]


def _in_terminal(columns: int, *arguments: str) -> str:
    """What a terminal of this width is sent."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment["TERM"] = "xterm-256color"
    argv = [sys.executable, "-m", "sparkctl", *arguments]
    with subprocess.Popen(argv, stdin=follower, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        sent = b""
        try:
            while piece := os.read(leader, 4096):
                sent += piece
        except OSError:  # the terminal's other end was closed
            pass
        process.wait(30)
    os.close(leader)
    return sent.decode()
