"""A bundle tells everything about a pair and nothing about its owner."""

from __future__ import annotations

import io
import json
import tarfile
import time
from dataclasses import replace
from typing import Any

import pytest

from cluster import bundle
from cluster.doctor import Log, examine
from cluster.facts import Facts
from cluster.inventory import Inventory, Node
from tests.cluster.doctor.pair import CODE, box, measured

MACHINE_ID = "5f1c0ffee5f1c0ffee5f1c0ffee5f1c0"
GPU = "GPU-8af600d1-2e78-f7ef-a63b-fb6bc715952c"
PUBLIC = "AAAAC3NzaC1lZDI1NTE5AAAAIBOdyPkWn5q0m1v2c3x4z5a6s7d8f9g0h1j2k3l4q5w6"
PRIVATE = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQ"

# Each of these stands somewhere below, in a fact, in the inventory or in a log.
NAMES = [
    "brontosaurus",
    "triceratops",
    "velociraptor.example.com",
    "stegosaurus",
    "allosaurus",
    "diplodocus",
    "carnotaurus",
]
SECRETS = [
    "hf_Iguanodon1234567890",
    "sk-Oviraptor1234567890",
    "ghp_Gallimimus1234567890",
    "PW-pterodactyl",
    "KEY-maiasaura",
]
SECRETS += [
    "WIFI-SECRET-ankylosaurus",
    "PASS-deinonychus",
    "two-word-utahraptor",
    "eyJhbGciOiJIUzI1NiJ9.parasaurolophus",
]
IDENTITIES = ["WIFI-megalosaurus", "LOGIN-spinosaurus", "SN-PLESIOSAUR-0042", MACHINE_ID, GPU[4:], PUBLIC, PRIVATE]
ADDRESSES = ["9.9.9.99", "8.8.4.4", "2001:db8:dead::77", "100.101.102.103", "fe80::4a21:bff:fe03:107", "48210b030107"]
ADDRESSES += ["48:21:0b:03:01:00", "48-21-0B-03-01-00", "4821.0b03.0100", "48210b0300010200", "4821:0b03:0001:0200"]
CANARIES = NAMES + SECRETS + IDENTITIES + ADDRESSES

NETPLAN = """
network:
  ethernets:
    enP7s7: {dhcp4: true, auth: {identity: LOGIN-spinosaurus, password: PASS-deinonychus}}
  wifis:
    wlP9s9:
      access-points:
        WIFI-megalosaurus: {}
"""

LOG = f"""
Traceback (most recent call last):
  File "/home/brontosaurus/my model/train.py", line 3, in <module>
KeyError: 'model.layers.3.mlp'
export HF_TOKEN=hf_Iguanodon1234567890 OPENAI_API_KEY='sk-Oviraptor1234567890'
{{"event": "login", "password": "PASS-deinonychus", "tokens_per_s": 812.5, "env": "MY_SECRET=KEY-maiasaura"}}
headers: {{'Authorization': 'Bearer eyJhbGciOiJIUzI1NiJ9.parasaurolophus', 'Cookie': 'KEY-maiasaura'}}
('API_KEY', 'KEY-maiasaura') --api-token KEY-maiasaura --password=PASS-deinonychus
passphrase: two-word-utahraptor is it
git clone https://brontosaurus:ghp_Gallimimus1234567890@velociraptor.example.com/x.git
\x1b[31mPW-\x1b[0mpterodactyl and %50W-pterodactyl
ssh diplodocus@9.9.9.99 as carnotaurus@allosaurus.local from 8.8.4.4:22 and [2001:db8:dead::77]:80, 100.101.102.103
ssh-ed25519 {PUBLIC} brontosaurus@triceratops
-----BEGIN OPENSSH PRIVATE KEY-----
{PRIVATE}
-----END OPENSSH PRIVATE KEY-----
link/ether 48:21:0b:03:01:00 or 48-21-0B-03-01-00 or 4821.0b03.0100 on enx48210b030107 inet6 fe80::4a21:bff:fe03:107/64
Node GUID: 0x48210b0300010200 and 4821:0b03:0001:0200
Serial Number: SN-PLESIOSAUR-0042  machine {MACHINE_ID} {GPU}
ssid=WIFI-megalosaurus psk=WIFI-SECRET-ankylosaurus
/Users/stegosaurus/.ssh/config and /home/diplodocus/x on Triceratops.local
NCCL INFO NET/IB : Using [0]rocep1s0f0:1/RoCE [1]roceP2p1s0f0:1/RoCE ; OOB enp1s0f0np0:192.168.100.10<0>
step 10 loss 2.5 tokens=4096
"""


def given(rank: int) -> Facts:
    """A node with something private in every fact that could have it."""
    private: dict[str, Any] = {
        "hostname": ("triceratops", "velociraptor.example.com")[rank],
        "machine_id": MACHINE_ID,
        "dgx_release": 'DGX_NAME="DGX Spark"\nDGX_SWBUILD_VERSION="7.2.3"\nDGX_SERIAL_NUMBER="SN-PLESIOSAUR-0042"\n',
        "user": {"uid": 1000, "name": "brontosaurus", "home": "/home/bronto saurus/brontosaurus"},
        "hosts": "127.0.0.1 localhost\n192.168.1.5 allosaurus.local allosaurus # stegosaurus\n9.9.9.99 diplodocus\n",
        "dmesg": f"nvidia: {GPU} at 48:21:0b:03:01:00\nusb: SerialNumber: SN-PLESIOSAUR-0042",
        "cmdline": f"root=UUID={GPU[4:]} ip=9.9.9.99 password=PASS-deinonychus",
        "gpu_processes": "6330, 96073 MiB, /home/brontosaurus/venv/bin/python\n",
        "listeners": [{"address": "0100007F:1F90", "user": "carnotaurus", "pid": 7, "command": "stegosaurus.local"}],
        "nft": 'table ip filter { ip saddr 9.9.9.99 accept comment "LOGIN-spinosaurus" }',
        "sparkctl": {
            "path": "/home/brontosaurus/.sparkctl",
            "mode": 448,
            "entries": [],
            "code": [CODE],
            "jobs": [],
            "unit": None,
        },
    }
    spark = box(rank, changes=private)
    spark.name = ("triceratops", "spark-b")[rank]
    spark.netplan = {
        "/etc/netplan/50-cloud.yaml": NETPLAN,
        "/etc/netplan/60.yaml": "- WIFI-megalosaurus\n",
        "/etc/netplan/90.yaml": ":\n:",
    }
    spark.addresses["enP7s7"] = (f"9.9.9.{99 + rank}/24", "fe80::4a21:bff:fe03:107/64", "192.168.1.21/24")
    spark.unknown = {"ibstat": "ibstat: /home/brontosaurus/x: PASSWORD=PASS-deinonychus"}
    return spark.facts()


INVENTORY = Inventory(
    nodes=(
        Node(
            name="triceratops", host="allosaurus.local", user="brontosaurus", identity_file="/home/brontosaurus/.ssh/id"
        ),
        Node(name="spark-b", host="9.9.9.99", user="carnotaurus"),
    ),
    env={"MY_PASSWORD": "PW-pterodactyl", "NCCL_DEBUG": "INFO", "API_TOKEN": "KEY-maiasaura"},
)


def rendered(**other: Any) -> dict[str, str]:
    """The files of a bundle, by name."""
    nodes = given(0), given(1)
    findings = examine(INVENTORY, nodes, code=CODE, logs=[Log("spark-b", "rank1.log", "NVRM: Xid 79 on triceratops")])
    asked: dict[str, Any] = {
        "measurement": replace(measured(), nodes=("triceratops", "spark-b")),
        "logs": [Log("triceratops", "jobs/brontosaurus-1/rank0.log", LOG), Log("spark-b", "../../etc/cron.d/x", LOG)],
        "secrets": ["stegosaurus-token", ""],
    } | other
    return unpacked(bundle.render(INVENTORY, nodes, findings, **asked))


def unpacked(archive: bytes) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        files = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        texts = {name: file.read().decode() for name, file in files.items() if file}
    assert all(name.startswith("sparkctl-bundle/") and "/.." not in name for name in texts)
    return {name.removeprefix("sparkctl-bundle/"): text for name, text in texts.items()}


@pytest.mark.parametrize("canary", CANARIES)
def test_nothing_private_is_in_it(canary: str) -> None:
    assert canary in LOG + NETPLAN + repr(given(0)) + repr(given(1)) + repr(INVENTORY.nodes) + repr(INVENTORY.env)
    for name, text in rendered().items():
        assert canary.casefold() not in text.casefold(), name
        assert canary.casefold() not in name.casefold()


def test_what_is_needed_is_in_it() -> None:
    files = rendered()
    assert set(files) == {
        "README.txt", "inventory.json", "facts-node-0.json", "facts-node-1.json", "findings.json", "measurement.json",
        "logs/node-0/jobs_user-1-1_rank0.log", "logs/node-1/etc_cron.d_x",
    }  # fmt: skip
    facts = json.loads(files["facts-node-0.json"])
    assert facts["kernel"] == "6.17.0-1008-nvidia"
    assert facts["gpus"][0]["name"] == "NVIDIA GB10"
    assert facts["gpus"][0]["driver"] == "580.126.09"
    assert facts["memory"]["total"] == 127600748 * 1024
    assert facts["sparkctl"]["code"] == [CODE]
    assert facts["ibstat"] == {"unknown": "ibstat: /home/user-1/x: PASSWORD=(secret)"}
    assert facts["release"]["serial"] == "(serial)"
    assert facts["pcie"][0]["address"] == "0000:01:00.0"
    (first, *_) = [nic for nic in facts["nics"] if nic["name"] == "enp1s0f0np0"]
    assert first["addresses"] == ["192.168.100.10/24"]
    assert "enP7s7" in facts["netplan"][0]["text"]
    assert json.loads(files["findings.json"])[0]["node"] == "node-0"
    assert json.loads(files["measurement.json"])["nodes"] == ["node-0", "node-1"]
    assert json.loads(files["inventory.json"])["env"] == {
        "MY_PASSWORD": "(secret)", "NCCL_DEBUG": "INFO", "API_TOKEN": "(secret)",
    }  # fmt: skip
    log = files["logs/node-0/jobs_user-1-1_rank0.log"]
    for kept in (
        "KeyError: 'model.layers.3.mlp'",
        '"tokens_per_s": 812.5',
        "tokens=4096",
        "192.168.100.10<0>",
        "rocep1s0f0:1/RoCE",
    ):
        assert kept in log


def test_the_same_thing_has_the_same_placeholder_everywhere() -> None:
    files = rendered()
    facts = [json.loads(files[f"facts-node-{rank}.json"]) for rank in (0, 1)]
    assert facts[0]["hostname"] == facts[0]["node"] == "node-0"
    assert facts[0]["machine_id"] == facts[1]["machine_id"]
    macs = [nic["mac"] for node in facts for nic in node["nics"]]
    assert len(set(macs)) == len(macs)
    assert facts[0]["user"]["name"] == facts[1]["user"]["name"] != facts[0]["listeners"][0]["user"]
    shown = next(nic["mac"] for nic in facts[0]["nics"] if nic["name"] == "enp1s0f0np0")
    assert f"link/ether {shown} or {shown} or {shown}" in files["logs/node-0/jobs_user-1-1_rank0.log"]
    assert bundle.render(INVENTORY, [given(0)], []) == bundle.render(INVENTORY, [given(0)], [])


def test_secrets_that_the_caller_knows_are_left_out_in_every_spelling() -> None:
    log = Log("spark-b", "a", 'hunter "2" and hunter \\"2\\" and hunter%20%222%22, x1 but not x12')
    files = rendered(logs=[log], secrets=['hunter "2"', "x1"])
    assert files["logs/node-1/a"] == "(secret) and (secret) and (secret), (secret) but not x12"


def test_of_a_long_log_the_end_is_kept_and_it_takes_no_time() -> None:
    lines = "2026-06-10 12:00:00 INFO rank 0 step=1 loss=2.31 tokens_per_s=812.4\n"
    began = time.monotonic()
    files = rendered(logs=[Log("spark-b", "big.log", lines * 40_000 + "the end")])
    assert len(files["logs/node-1/big.log"]) == bundle.MOST_LOG
    assert files["logs/node-1/big.log"].endswith("the end")
    for awkward in ("-" * 99_000, "ssh-" * 25_000, "key" * 33_000, '"' * 99_000, "a.b@" * 25_000, "12:" * 33_000):
        rendered(logs=[Log("spark-b", "a", awkward)])
    assert time.monotonic() - began < 60


def test_logs_of_one_name_do_not_hide_each_other_and_a_node_may_be_missing() -> None:
    logs = [Log("spark-b", "a", "one"), Log("spark-b", "a", "two"), Log("elsewhere", "", "three")]
    files = unpacked(bundle.render(INVENTORY, [], [], logs=logs))
    assert set(files) == {
        "README.txt", "inventory.json", "findings.json", "logs/node-1/a", "logs/node-1/a.2", "logs/node-unknown/log",
    }  # fmt: skip
