"""The environment of a rank on two real boxes: its own node's names, both twins, a reason for each variable."""

from __future__ import annotations

import shlex
import subprocess

from cluster import environ, link
from cluster.inventory import Link
from tests.cluster.fixtures import Spark

PORT = 29500


def variables(head: Spark, peer: Spark, rank: int) -> tuple[environ.Variable, ...]:
    nodes = head.facts(), peer.facts()
    return environ.fabric(link.plan(*nodes, Link()), nodes, rank=rank, port=PORT)


def rendered(rank: int = 0, **both: object) -> dict[str, str]:
    head, peer = Spark("spark-a", 1, **both), Spark("spark-b", 2, **both)  # type: ignore[arg-type]
    return environ.as_mapping(variables(head, peer, rank))


def test_both_twins_carry_nccl_and_the_first_its_bootstrap() -> None:
    env = rendered()
    assert env["NCCL_IB_HCA"] == "rocep1s0f0,roceP2p1s0f0"
    for name in (
        "NCCL_SOCKET_IFNAME",
        "TP_SOCKET_IFNAME",
        "UCX_NET_DEVICES",
        "OMPI_MCA_btl_tcp_if_include",
        "GLOO_SOCKET_IFNAME",
    ):
        assert env[name] == "enp1s0f0np0"
    assert (env["NCCL_NET"], env["NCCL_IB_DISABLE"], env["NCCL_CROSS_NIC"]) == ("IB", "0", "1")
    assert (env["NCCL_IB_ROCE_VERSION_NUM"], env["NCCL_IB_ADDR_FAMILY"]) == ("2", "AF_INET")
    assert (env["NCCL_IGNORE_CPU_AFFINITY"], env["NCCL_NVLS_ENABLE"], env["NCCL_CUMEM_ENABLE"]) == ("1", "0", "0")
    assert env["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "NCCL_IB_GID_INDEX" not in env


def test_each_rank_gets_torchruns_variables_and_the_heads_address() -> None:
    for rank in (0, 1):
        env = rendered(rank)
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == (
            str(rank),
            "0",
            "2",
            "1",
        )
        assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("192.168.100.10", str(PORT))
        assert env["OMP_NUM_THREADS"] == "20"


def test_names_are_those_of_the_ranks_own_node() -> None:
    head, peer = Spark(), Spark("spark-b", 2, cabled=(1,))
    env = environ.as_mapping(variables(head, peer, 1))
    assert env["NCCL_IB_HCA"] == "rocep1s0f1,roceP2p1s0f1"
    assert env["NCCL_SOCKET_IFNAME"] == "enp1s0f1np1"
    assert env["MASTER_ADDR"] == "192.168.100.10"


def test_gloo_stripes_over_both_rails_where_a_node_has_no_gpu() -> None:
    assert rendered(changes={"devices": []})["GLOO_SOCKET_IFNAME"] == "enp1s0f0np0,enP2p1s0f0np0"
    head, peer = Spark(), Spark("spark-b", 2, unknown={"gpu": "nvidia-smi: not installed"})
    assert environ.as_mapping(variables(head, peer, 0))["GLOO_SOCKET_IFNAME"] == "enp1s0f0np0,enP2p1s0f0np0"


def test_subnet_aware_routing_is_for_nccl_that_knows_it_on_both_nodes() -> None:
    new, old = {"nccl_libraries": ["libnccl.so.2.30.1"]}, {"nccl_libraries": ["libnccl.so.2.28.3"]}
    name = "NCCL_IB_SUBNET_AWARE_ROUTING"
    assert rendered(changes=new)[name] == "1"
    assert name not in rendered(changes=old)
    assert name not in rendered()  # nothing known
    assert name not in environ.as_mapping(variables(Spark(changes=new), Spark("spark-b", 2, changes=old), 0))


def test_every_variable_says_why_and_stands_once() -> None:
    found = variables(Spark(), Spark("spark-b", 2), 0)
    assert all(one.why for one in found)
    assert len({one.name for one in found}) == len(found)


def test_the_inventorys_env_wins_and_its_secrets_are_never_shown() -> None:
    own = {"NCCL_CROSS_NIC": "0", "WANDB_API_KEY": "hunter2", "NCCL_DEBUG": "INFO", "MASTER_ADDR": "10.0.0.1"}
    shown = environ.shown(variables(Spark(), Spark("spark-b", 2), 0), own)
    values = environ.as_mapping(shown)
    assert (values["NCCL_CROSS_NIC"], values["NCCL_DEBUG"]) == ("0", "INFO")
    assert values["MASTER_ADDR"] == "192.168.100.10"  # not the inventory's to give, as a rank does not get it either
    assert values["WANDB_API_KEY"] == "(secret)"
    assert values["TOKENIZERS_PARALLELISM"] == "false"
    assert "hunter2" not in environ.as_text(shown)
    assert next(one.why for one in shown if one.name == "NCCL_CROSS_NIC") == "the inventory's `env`"


def test_a_shell_reads_what_is_printed() -> None:
    text = environ.as_text(environ.shown(variables(Spark(), Spark("spark-b", 2), 0), {"NOTE": "it's $(reboot) # all"}))
    script = f'set -a\n{text}\nprintf \'%s|%s\' "$NCCL_IB_HCA" "$NOTE"'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=10)
    assert done.stdout == "rocep1s0f0,roceP2p1s0f0|it's $(reboot) # all"
    assert shlex.split(text, comments=True)[0] == "RANK=0"
