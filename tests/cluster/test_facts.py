"""A node's answer becomes typed facts, or one line that names the node; nothing in it can do harm."""

from __future__ import annotations

import dataclasses
import json
from ipaddress import IPv4Interface

import pytest

from cluster import facts
from cluster.errors import FailedError
from cluster.facts import Facts, Packages, Unknown
from tests.cluster.fixtures import Profile, Spark


def test_a_healthy_spark_is_known_by_everything_it_says() -> None:
    found = Spark().facts()
    unknown = {field.name for field in dataclasses.fields(Facts) if isinstance(getattr(found, field.name), Unknown)}
    assert unknown == set()
    assert (found.node, found.hostname, found.machine, found.cores) == ("spark-a", "spark-a", "aarch64", 20)
    assert found.is_spark is True
    assert found.has_cuda
    assert found.kernel == "6.17.0-1008-nvidia"
    assert found.cuda == "13.0.2"
    assert facts.known(found.memory, None).allocatable > 120 << 30
    assert found.has_tool("rsync") is True
    assert found.has_tool("uv") is False
    assert [link.width for link in facts.known(found.pcie, ())] == [4, 4, 4, 4]
    assert found.unit("ssh.service").oom_score_adjust == -1000
    assert found.unit("earlyoom.service") is None


def test_an_interface_has_its_state_addresses_and_configuration() -> None:
    box = Spark(speed={"enp1s0f0np0": 100000}).configured(("enp1s0f0np0", "192.168.100.10/24"), mtu=9000)
    nic = box.facts().nic("enp1s0f0np0")
    assert nic is not None
    assert (nic.up, nic.carrier, nic.speed, nic.ethtool_speed, nic.mtu) == (True, True, 100000, 100000, 9000)
    assert nic.ipv4 == (IPv4Interface("192.168.100.10/24"),)
    assert (nic.manager, nic.driver, str(nic.pci)) == ("NetworkManager", "mlx5_core", "0000:01:00.0")
    assert [profile.addresses for profile in facts.known(nic.profiles, ())] == [(IPv4Interface("192.168.100.10/24"),)]


def test_an_interface_without_a_carrier_has_no_speed() -> None:
    nic = Spark().facts().nic("enp1s0f1np1")
    assert nic is not None
    assert (nic.carrier, nic.speed, nic.ethtool_speed, nic.operstate) == (False, None, None, "down")


def test_an_interface_that_is_set_down_has_an_unknown_carrier() -> None:
    nic = Spark(off=("enp1s0f1np1",)).facts().nic("enp1s0f1np1")
    assert nic is not None
    assert (nic.up, nic.carrier) == (False, None)


def test_networkd_has_what_it_configures_and_nothing_else() -> None:
    box = Spark(manager="networkd").configured(("enp1s0f0np0", "192.168.100.10/24"))
    found = box.facts()
    assert found.managers == ("networkd",)
    assert (found.nic("enp1s0f0np0").manager, found.nic("enp1s0f1np1").manager) == ("networkd", None)


def test_a_profile_bound_to_a_mac_belongs_to_that_interface() -> None:
    box = Spark()
    profile = Profile(
        "", ("10.0.0.1/24",), "/etc/NetworkManager/system-connections/a.nmconnection", mac=box.mac(0).upper()
    )
    box.profiles = (profile,)
    assert [one.source for one in box.facts().nic("enp1s0f0np0").profiles] == [profile.source]
    assert box.facts().nic("enP2p1s0f0np0").profiles == ()


def test_not_there_is_not_unknown() -> None:
    found = Spark(changes={"dgx_release": None, "networkmanager": None}, unknown={"nft": "nft: not permitted"}).facts()
    assert found.release is None
    assert found.managers == ()
    assert found.nft == Unknown("nft: not permitted")


@pytest.mark.parametrize("name", sorted(Spark().values()))
def test_any_single_fact_may_be_unknown(name: str) -> None:
    found = Spark(unknown={name: "it hangs"}).facts()
    assert isinstance(found, Facts)
    dataclasses.asdict(found)


def test_who_has_an_interface_is_unknown_where_a_manager_does_not_answer() -> None:
    nic = Spark(unknown={"networkmanager": "nmcli: not done after 4 s"}).facts().nic("enp1s0f0np0")
    assert nic is not None
    assert nic.manager == nic.profiles == Unknown("nmcli: not done after 4 s")


def test_a_gpu_that_nvidia_smi_names_but_that_has_no_device_is_of_no_use() -> None:
    assert not Spark(changes={"devices": []}).facts().has_cuda
    assert not Spark(unknown={"gpu": "nvidia-smi: exit status 18: Driver/library version mismatch"}).facts().has_cuda


def test_nccl_is_the_one_that_torch_brought() -> None:
    packages = {
        "python": "/v/bin/python",
        "version": "3.12.3",
        "distributions": {"nvidia-nccl-cu13": "2.30.4", "torch": "2.13.0"},
    }
    found = Spark(changes={"packages": packages, "nccl_libraries": ["libnccl.so.2.28.3"]}).facts()
    assert found.nccl == "2.30.4"
    assert isinstance(found.packages, Packages)
    assert (found.packages.version_of("torch"), found.packages.version_of("peft")) == ("2.13.0", None)
    assert Spark(changes={"nccl_libraries": ["libnccl.so.2.28.3"]}).facts().nccl == "2.28.3"
    assert Spark().facts().nccl is None


def test_a_function_with_virtual_ones_is_known_by_its_gids() -> None:
    box = Spark(addresses={"enp1s0f0np0": ("192.168.100.10/24",)})
    devices = box.values()["roce"]
    devices["rocep1s0f0"]["interfaces"] = ["enp1s0f0np0", "pf0vf0"]
    box.changes = {"roce": devices}
    (device,) = [one for one in facts.known(box.facts().roce, ()) if one.name == "rocep1s0f0"]
    assert device.interface == "enp1s0f0np0"
    assert [(gid.index, str(gid.ipv4), gid.kind) for gid in device.gids][1] == (1, "192.168.100.10", "RoCE v2")


def test_what_a_shell_prints_before_and_after_does_not_matter() -> None:
    raw = b"Welcome to spark-a!\n{}\n" + Spark().answer() + b"bye\n"
    assert facts.parse(raw, "spark-a").hostname == "spark-a"


def _with(**changes: object) -> bytes:
    return Spark(changes=changes).answer()


BROKEN = {
    "nothing": b"",
    "ten megabytes of garbage": bytes(range(256)) * 40_000,
    "too large an answer": Spark(changes={"nft": "x" * (5 << 20)}).answer(),
    "cut short": Spark().answer()[:2000],
    "another program's JSON": b'{"facts": {}}\n',
    "no facts": b'{"sparkctl_probe": 1, "time": 1.0, "duration": 1.0}\n',
    "nested without end": b'{"sparkctl_probe": ' + b"[" * 200_000,
    "nested without end inside": _with(networkd=[{"Name": "a", "addresses": [json.loads("[" * 300 + "]" * 300)]}]),
    "a number of many digits": b'{"sparkctl_probe": 1, "time": ' + b"9" * 100_000 + b"}\n",
    "no number": b'{"sparkctl_probe": 1, "time": NaN}\n',
    "an endless time": Spark().answer().replace(b"1781085600.5", b"1e999"),
    "a list for a mapping": _with(nics=[]),
    "a number for a text": _with(meminfo=7),
    "a text for a number": _with(cpu={"cores": "20", "machine": "aarch64"}),
    "a truth for a number": _with(cpu={"cores": True, "machine": "aarch64"}),
    "a mapping for a fact": Spark().answer().replace(b'"hostname": {"value": "spark-a"}', b'"hostname": "spark-a"'),
    "a fact left out": Spark().answer().replace(b'"meminfo"', b'"meminf0"'),
    "a value of another shape": _with(roce={"a": {"ports": None}}),
    "half a character": Spark().answer().replace(b'"aarch64"', b'"\\ud800"'),
    "no UTF-8": Spark().answer().replace(b'"aarch64"', b'"\xff\xfe"'),
    "no cores": _with(cpu={"cores": 0, "machine": "aarch64"}),
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_one_line_that_names_the_node(raw: bytes) -> None:
    with pytest.raises(FailedError) as error:
        facts.parse(raw, "spark-b")
    assert error.value.message.startswith("spark-b: the probe")
    assert error.value.message.isprintable()
    assert len(error.value.message) < 300
    assert error.value.fix


def test_a_hostile_node_cannot_talk_to_the_terminal() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202e"
    box = Spark(
        changes={
            "hostname": evil,
            "kernel": f"6.17\n{evil}",
            "dmesg": f"one\r{evil}\ntwo",
            "hosts": f"127.0.0.1 {evil}\n",
            "gpu": f"name, uuid\nGB10 {evil}, x\n",
            "tools": {evil: "/x"},
        },
        unknown={"nft": evil},
    )
    shown = repr(dataclasses.astuple(box.facts()))
    assert not any(character in shown for character in evil if not character.isprintable())
    for line in facts.known(box.facts().dmesg, ()):
        assert line.isprintable()
    gpus = box.facts().gpus
    assert not isinstance(gpus, Unknown)
    assert gpus[0].name.isprintable()


def test_numbers_that_no_machine_has_are_none() -> None:
    box = Spark()
    nics = box.values()["nics"]
    nics["enp1s0f0np0"] |= {"mtu": "9" * 200, "speed": "-1", "flags": "yes", "carrier": "2"}
    box.changes = {"nics": nics}
    nic = box.facts().nic("enp1s0f0np0")
    assert nic is not None
    assert (nic.mtu, nic.speed, nic.up, nic.carrier) == (None, None, False, None)


def test_files_read_with_sudo_join_the_facts_without_their_secrets() -> None:
    box = Spark(netplan={"/etc/netplan/40-cx7.yaml": None, "/etc/netplan/50-a.yaml": "network: {}\n"})
    before = box.facts()
    after = facts.with_netplan(before, {"/etc/netplan/40-cx7.yaml": "wifis:\n  a: b\n  password: hunter2\n"})
    assert isinstance(facts.known(before.netplan, ())[0].text, Unknown)
    first, second = facts.known(after.netplan, ())
    assert "a: b" in str(first.text)
    assert "hunter2" not in str(first.text)
    assert second.text == "network: {}\n"


def test_a_clock_that_is_off_is_told_with_its_uncertainty() -> None:
    found = Spark().facts()  # began at ...600.5 by its clock and took 0.25 s
    ahead, within = facts.clock_skew(found, asked=1781085570.0, answered=1781085570.65)
    assert ahead == pytest.approx(30.3)
    assert within == pytest.approx(0.2)
