"""The environment of ranks: rendered, with nothing inherited that would lead them astray or give secrets away."""

from __future__ import annotations

import pytest

from cluster import environ

SHELL = {
    "PATH": "/usr/bin",
    "LANG": "C.UTF-8",
    "HF_TOKEN": "hf_secret",
    "HUGGING_FACE_HUB_TOKEN": "hf_secret",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "db_password": "secret",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "29500",
    "RANK": "7",
    "LOCAL_RANK": "7",
    "GROUP_RANK": "7",
    "ROLE_WORLD_SIZE": "8",
    "WORLD_SIZE": "8",
    "TORCHELASTIC_RUN_ID": "other",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "NCCL_SOCKET_IFNAME": "eth0",
    "GLOO_SOCKET_IFNAME": "eth0",
    "SPARKCTL_STORE_FD": "3",
    "SPARKCTL_HOME": "/home/alice/.sparkctl",
}


@pytest.mark.parametrize(
    ("interfaces", "expected"), [(("eth0", "lo"), "lo"), (("lo0", "en0"), "lo0"), (("loop", "eth0"), "lo")]
)
def test_the_loopback_interface_is_found_by_its_name(interfaces: tuple[str, ...], expected: str) -> None:
    assert environ.loopback(interfaces) == expected


def test_a_rank_of_the_embedded_pair_has_torchruns_variables_loopback_and_its_share_of_the_cores() -> None:
    rendered = environ.embedded(rank=1, world_size=2, cores=5, interfaces=("eth0", "lo"), port=4711)
    assert {name: rendered[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert (rendered["MASTER_ADDR"], rendered["MASTER_PORT"]) == ("127.0.0.1", "4711")
    assert rendered["GLOO_SOCKET_IFNAME"] == "lo"
    assert rendered["OMP_NUM_THREADS"] == "2"
    assert rendered["HF_HUB_OFFLINE"] == "1"
    alone = environ.embedded(rank=0, world_size=2, cores=1, interfaces=("lo",), port=1)
    assert alone["OMP_NUM_THREADS"] == "1"


def test_a_rank_inherits_neither_secrets_nor_another_rendezvous() -> None:
    assert environ.combine(SHELL, {}, {}) == {
        "PATH": "/usr/bin",
        "LANG": "C.UTF-8",
        "SPARKCTL_HOME": "/home/alice/.sparkctl",
    }


def test_the_inventory_wins_over_ours_but_not_over_the_rendezvous() -> None:
    rendered = {"RANK": "0", "OMP_NUM_THREADS": "2", "NCCL_DEBUG": "WARN"}
    own = {
        "OMP_NUM_THREADS": "8",
        "NCCL_DEBUG": "INFO",
        "RANK": "5",
        "HF_TOKEN": "hf_secret",
        "WANDB_API_KEY": "secret",
    }
    assert environ.combine({}, rendered, own) == {
        "RANK": "0",
        "OMP_NUM_THREADS": "8",
        "NCCL_DEBUG": "INFO",
        "WANDB_API_KEY": "secret",
    }


def test_an_agent_gets_the_inventorys_secrets_and_none_of_the_shells() -> None:
    given = environ.for_agent(SHELL, {"WANDB_API_KEY": "given", "db_password": "given"})
    assert "HF_TOKEN" not in given
    assert "AWS_SECRET_ACCESS_KEY" not in given
    assert given["PATH"] == "/usr/bin"
    assert environ.secrets_of(given) == {"WANDB_API_KEY": "given", "db_password": "given"}
    assert environ.secrets_of(environ.for_agent(SHELL, {})) == {}
    assert environ.secrets_of(SHELL) == {}
