"""What a `kind: command` recipe runs on each side, with the words of the pair in it; and what vLLM is given exists there."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import command, recipe
from launch.command import Words
from launch.recipe import CommandRecipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
READY = sorted(path.name for path in RECIPES.glob("*.yaml") if path.read_text().splitlines()[1] == "kind: command")
HEAD, PEER = (Words(side, "192.168.100.10", "192.168.100.11", "/srv/models/m") for side in (0, 1))
# Of `vllm serve --help`, vLLM 0.11 to 0.15: docs.vllm.ai/en/latest/cli/serve (multi-node: .../serving/parallelism_scaling).
VLLM = {
    *("--host", "--port", "--tensor-parallel-size", "--pipeline-parallel-size", "--distributed-executor-backend"),
    *("--nnodes", "--node-rank", "--master-addr", "--master-port", "--headless", "--max-model-len"),
    *("--gpu-memory-utilization", "--max-num-seqs", "--served-model-name", "--quantization", "--enforce-eager"),
}


def ready(name: str) -> CommandRecipe:
    found = recipe.load(RECIPES / name)
    assert isinstance(found, CommandRecipe)
    return found


def made(**keys: object) -> CommandRecipe:
    return CommandRecipe.model_validate({"kind": "command", "name": "it", **keys})


def test_words_of_the_pair_are_filled_in_and_other_braces_stay() -> None:
    serve = made(
        command=["serve", "{model}", "--rank={node_rank}", '{"a": {"b": 1}}', "{head_addr}:{peer_addr}"], model="m"
    )
    assert command.argv(serve, 1, PEER) == (
        "serve",
        "/srv/models/m",
        "--rank=1",
        '{"a": {"b": 1}}',
        "192.168.100.10:192.168.100.11",
    )


def test_what_is_filled_in_is_not_filled_again() -> None:
    assert Words(0, "{model}", "", "x").fill("{head_addr}") == "{model}"


def test_a_side_without_a_command_runs_nothing() -> None:
    assert command.sides(made(command="a b")) == (0, 1)
    assert command.sides(made(command={"peer": "a"})) == (1,)
    assert command.argv(made(command={"peer": "a"}), 0, HEAD) == ()


def test_a_container_gets_the_link_the_gpu_and_names_of_variables_only() -> None:
    argv = command.in_container(
        "img:1", ("run", "it"), name="sparkctl-x-0", variables={"NCCL_NET", "A_TOKEN"},
        folders={"/srv/m": False, "/home/a b/jobs/x": True}, has_gpu=True, has_rdma=True,
    )  # fmt: skip
    text = " ".join(argv)
    assert text.startswith("docker run --rm --init --network host --ipc host --ulimit memlock=-1 ")
    assert "--device /dev/infiniband" in text
    assert "--gpus all" in text
    assert "--env A_TOKEN --env NCCL_NET" in text
    assert argv[-3:] == ("img:1", "run", "it")
    assert "/srv/m:/srv/m:ro" in argv
    assert "/home/a b/jobs/x:/home/a b/jobs/x" in argv
    plain = command.in_container("i", ("x",), name="n", variables=(), folders={}, has_gpu=False, has_rdma=False)
    assert "--device" not in plain
    assert "--gpus" not in plain


@pytest.mark.parametrize("name", READY)
def test_a_ready_recipe_has_no_word_left_to_fill(name: str) -> None:
    found = ready(name)
    for side in command.sides(found):
        argv = command.argv(found, side, PEER if side else HEAD)
        assert argv
        assert not any("{" in word for word in argv)


def test_the_ready_commands_are_those_that_were_promised() -> None:
    assert READY == ["jupyter.yaml", "llama-cpp-rpc.yaml", "nccl-tests.yaml", "vllm.yaml"]


@pytest.mark.parametrize("side", [0, 1])
def test_vllm_is_given_options_that_its_documentation_names(side: int) -> None:
    argv = command.argv(ready("vllm.yaml"), side, PEER if side else HEAD)
    assert argv[:3] == ("vllm", "serve", "/srv/models/m")
    assert {word for word in argv if word.startswith("--")} <= VLLM
    assert ("--headless" in argv) == (side == 1)
    assert argv[argv.index("--node-rank") + 1] == str(side)
    assert argv[argv.index("--master-addr") + 1] == "192.168.100.10"
    assert argv[argv.index("--nnodes") + 1] == "2"
