"""What the tools of a DGX Spark print is understood, and what they might print otherwise does no harm."""

from __future__ import annotations

import string
from ipaddress import IPv4Address, IPv4Interface, IPv6Address

import pytest

from cluster.readings import box, mdns, network, roce
from tests.cluster.fixtures import text

GIB = 1 << 30


def test_a_release_as_delivered_is_read() -> None:
    release = box.dgx_release(text("dgx-release"))
    assert (release.name, release.version, release.updated) == ("NVIDIA DGX Spark", "7.2.3", None)


def test_the_last_update_is_the_release_that_runs() -> None:
    release = box.dgx_release(text("dgx-release-updated-twice"))
    assert (release.built, release.updated, release.version) == ("7.2.3", "7.5.0", "7.5.0")


def test_a_gb10_knows_nothing_of_its_memory() -> None:
    (gpu,) = box.gpus(text("nvidia-smi.csv"))
    assert (gpu.name, gpu.driver, gpu.memory) == ("NVIDIA GB10", "580.126.09", None)
    assert (gpu.temperature, gpu.utilization, gpu.power) == (35, 0, 11.17)
    assert (gpu.clock, gpu.max_clock, gpu.state, gpu.clock_reasons) == (208, 3003, "P8", 1)
    assert gpu.is_gb10


def test_columns_that_a_driver_lacks_are_none() -> None:
    (gpu,) = box.gpus(text("nvidia-smi-busy.csv"))
    assert (gpu.utilization, gpu.clock, gpu.power, gpu.clock_reasons) == (96, 507, None, None)


def test_the_name_of_a_process_may_hold_commas() -> None:
    (first, second) = box.gpu_processes(
        "6330, 96073 MiB, sglang::scheduler\n77, [N/A], python3 -c 'a, b'\nNo running\n"
    )
    assert (first.pid, first.memory, first.name) == (6330, 96073, "sglang::scheduler")
    assert (second.memory, second.name) == (None, "python3 -c 'a, b'")


def test_allocatable_is_available_and_swap() -> None:
    memory = box.memory(text("meminfo-2026"))
    assert memory is not None
    assert round(memory.total / GIB, 1) == 121.7
    assert memory.allocatable == (118934920 + 16777212) * 1024
    assert memory.cma == 32768 * 1024


def test_allocatable_is_the_free_huge_pages_where_there_are_any() -> None:
    memory = box.memory(text("meminfo-2025-huge-pages"))
    assert memory is not None
    assert round(memory.total / GIB, 1) == 119.7
    assert (memory.allocatable, memory.cma) == (8192 * 2048 * 1024, None)


def test_the_toolkit_is_known_by_its_file_and_else_by_nvcc() -> None:
    assert box.cuda_version({"/usr/local/cuda-13.0": text("cuda-version.json")}, None) == "13.0.2"
    old = text("cuda-version.json").replace("13.0.2", "9.10.1")
    assert box.cuda_version({"a": old, "b": text("cuda-version.json"), "c": "{"}, text("nvcc")) == "13.0.2"
    assert box.cuda_version({}, text("nvcc")) == "13.0.88"
    assert box.cuda_version({"a": '{"cuda": []}'}, None) is None


def test_units_that_are_not_there_say_so() -> None:
    ssh, earlyoom = box.units(text("systemctl-show"))
    assert (ssh.name, ssh.active, ssh.oom_score_adjust) == ("ssh.service", "active", -1000)
    assert (earlyoom.load, earlyoom.enabled) == ("not-found", "")


def test_versions_compare_as_numbers() -> None:
    assert box.version_numbers("2.9.0+cu130") == (2, 9, 0)
    assert (box.version_numbers("2.30.1") or ()) > (box.version_numbers("2.4") or ())
    assert box.version_numbers("unknown") is None
    assert box.nccl_library(("libnccl.so.2", "libnccl.so.2.9.1", "libnccl.so.2.28.3")) == "2.28.3"


def test_a_firewall_and_a_clock_are_read() -> None:
    assert box.ufw_enabled("# comment\nENABLED=yes\n")
    assert not box.ufw_enabled("ENABLED=no\n")
    assert box.clock_synchronized(text("timedatectl-show")) is True
    assert box.clock_synchronized("NTP=yes\n") is None


def test_roce_devices_are_mapped_whatever_the_order_of_lines() -> None:
    found = roce.ibdev2netdev(text("ibdev2netdev"))
    assert found["rocep1s0f1"] == ("enp1s0f1np1", True)
    assert found["roceP2p1s0f0"] == ("enP2p1s0f0np0", False)
    assert len(found) == 4


def test_ibstat_tells_a_link_that_is_up_from_one_that_is_down() -> None:
    up, down = roce.ibstat(text("ibstat"))
    assert (up.device, up.kind, up.state, up.physical, up.rate) == ("rocep1s0f1", "MT4129", "Active", "LinkUp", 200)
    assert (down.state, down.physical, down.rate) == ("Down", "Disabled", 40)
    assert up.firmware == "28.45.4028"


def test_a_pcie_link_that_is_too_narrow_is_seen() -> None:
    good, bad = roce.lspci(text("lspci-downgraded"))  # the third function shows nothing without root
    assert (str(good.address), good.speed, good.width, good.is_downgraded) == ("0000:01:00.0", 32, 4, False)
    assert (str(bad.address), bad.width, bad.max_width, bad.is_downgraded) == ("0002:01:00.0", 2, 4, True)


def test_sysfs_tells_of_a_pcie_link_without_root() -> None:
    link = roce.sysfs_link("0002:01:00.1", "32.0 GT/s PCIe", "2", "32.0 GT/s PCIe", "4")
    assert link is not None
    assert (link.width, link.is_downgraded, link.address.function) == (2, True, 1)
    assert roce.sysfs_link("0002:01:00.1", "Unknown", "0", "32.0 GT/s PCIe", "4") is None


def test_states_rates_and_gids_of_sysfs_are_read() -> None:
    assert (roce.state("4: ACTIVE"), roce.state("5: LinkUp"), roce.state("junk"), roce.state(None)) == (
        "ACTIVE",
        "LinkUp",
        None,
        None,
    )
    assert (roce.rate("200 Gb/sec (4X HDR)"), roce.rate("2.5 Gb/sec"), roce.rate("")) == (200, 2.5, None)
    gid = roce.gid_address("0000:0000:0000:0000:0000:ffff:c0a8:640a")
    assert gid is not None
    assert roce.Gid(3, gid, "RoCE v2", None).ipv4 == IPv4Address("192.168.100.10")
    assert roce.pci_slot("DRIVER=mlx5_core\nPCI_SLOT_NAME=0002:01:00.1\n") == roce.PciAddress(2, 1, 0, 1)


@pytest.mark.parametrize(("name", "speed"), [("200000", 200000), ("100000", 100000), ("unknown", None)])
def test_ethtool_shows_the_speed(name: str, speed: int | None) -> None:
    assert network.ethtool_speed(text(f"ethtool-{name}")) == speed


def test_only_routes_to_networks_count() -> None:
    found = network.routes(
        '[{"dst": "default", "gateway": "192.168.1.1", "dev": "enP7s7"},'
        ' {"dst": "172.17.0.0/16", "dev": "docker0", "scope": "link"},'
        ' {"type": "local", "dst": "192.168.1.21", "dev": "enP7s7", "table": "local"},'
        ' {"type": "broadcast", "dst": "192.168.1.255", "dev": "enP7s7", "table": "local"},'
        ' {"dst": "junk", "dev": "x"}, 7]'
    )
    assert found is not None
    assert [(str(route.network), route.interface) for route in found] == [
        ("0.0.0.0/0", "enP7s7"),
        ("172.17.0.0/16", "docker0"),
    ]
    assert found[0].gateway == IPv4Address("192.168.1.1")


def test_neighbours_that_never_answered_are_none() -> None:
    heard = '{"dst": "10.0.0.9", "dev": "a", "lladdr": "AA:BB:CC:00:00:01", "state": ["STALE"]}'
    rows = f'[{heard}, {{"dst": "10.0.0.8", "dev": "a", "state": ["FAILED"]}}]'
    assert [(one.mac, str(one.address)) for one in network.neighbours(rows)] == [("aa:bb:cc:00:00:01", "10.0.0.9")]


CONNECTIONS = """\
aaaa:802-3-ethernet:/run/NetworkManager/system-connections/netplan-enp1s0f0np0.nmconnection
bbbb:802-3-ethernet:/run/NetworkManager/system-connections/Wired connection 3.nmconnection
cccc:802-3-ethernet:/etc/NetworkManager/system-connections/lab\\: left.nmconnection
dddd:802-3-ethernet:/etc/NetworkManager/system-connections/off.nmconnection
"""
PROFILES = """\
connection.uuid:aaaa
connection.id:netplan-enp1s0f0np0
connection.interface-name:enp1s0f0np0
connection.autoconnect:yes
802-3-ethernet.mtu:9000
802-3-ethernet.mac-address:
ipv4.method:manual
ipv4.addresses:192.168.100.10/24, 192.168.110.10/24

connection.uuid:bbbb
connection.id:Wired connection 3
connection.interface-name:enp1s0f0np0
connection.autoconnect:yes
802-3-ethernet.mtu:auto
802-3-ethernet.mac-address:
ipv4.method:auto
ipv4.addresses:

connection.uuid:cccc
connection.id:lab: left
connection.interface-name:
connection.autoconnect:yes
802-3-ethernet.mtu:auto
802-3-ethernet.mac-address:48:21:0B:03:01:02
ipv4.method:auto
ipv4.addresses:10.0.0.1/8

connection.uuid:dddd
connection.id:off
connection.interface-name:enp1s0f0np0
connection.autoconnect:no
ipv4.method:manual
ipv4.addresses:10.9.9.9/24
"""


def test_only_profiles_that_last_and_start_by_themselves_count() -> None:
    generated, by_mac = network.nmcli_profiles(CONNECTIONS, PROFILES, ["aaaa"])
    assert (generated.interface, generated.mtu, generated.active) == ("enp1s0f0np0", 9000, True)
    assert generated.addresses == (IPv4Interface("192.168.100.10/24"), IPv4Interface("192.168.110.10/24"))
    assert (by_mac.name, by_mac.mac, by_mac.active) == ("lab: left", "48:21:0b:03:01:02", False)
    assert by_mac.addresses == ()  # method auto: they come from a DHCP server, if at all
    assert by_mac.source.endswith("/lab: left.nmconnection")


def test_networkd_tells_its_own_addresses_from_foreign_ones() -> None:
    mine = {"Family": 2, "Address": [192, 168, 100, 10], "PrefixLength": 24, "ConfigSource": "static"}
    links = [
        {
            "Name": "enp1s0f0np0",
            "AdministrativeState": "configured",
            "NetworkFile": "/run/systemd/network/10-netplan-enp1s0f0np0.network",
            "addresses": [
                mine,
                mine | {"ConfigSource": "foreign", "Address": [10, 0, 0, 1]},
                mine | {"Address": [300]},
                5,
            ],
        },
        {"Name": "lo", "AdministrativeState": "unmanaged", "NetworkFile": None, "addresses": []},
    ]
    (profile,) = network.networkd_profiles(links)
    assert profile.addresses == (IPv4Interface("192.168.100.10/24"),)
    assert profile.source.endswith("10-netplan-enp1s0f0np0.network")


def test_a_socket_of_proc_is_an_address_and_a_port() -> None:
    assert network.socket_address("0100007F:1F90") == (IPv4Address("127.0.0.1"), 8080)
    assert network.socket_address("00000000000000000000000001000000:0016") == (IPv6Address("::1"), 22)
    assert network.socket_address("xyz") is None


def test_mdns_gives_names_to_choose_from_and_nothing_that_bites() -> None:
    spark, second = mdns.avahi_browse(text("avahi-browse"))
    assert (spark.name, spark.host, spark.interface) == ("spark-1d84 (2)", "spark-1d84.local", "enp1s0f1np1")
    assert (spark.address, spark.port) == (IPv4Address("192.168.100.11"), 22)
    assert (second.name, second.port) == ("Büro; Spark", 2222)


PARSERS = [
    box.assignments, box.dgx_release, box.os_release, box.gpus, box.gpu_processes, box.memory, box.units,
    box.clock_synchronized, box.ufw_enabled, box.number, box.whole, box.version_numbers, roce.state, roce.rate,
    roce.gid_address, roce.pci_address, roce.pci_slot, roce.ibdev2netdev, roce.ibstat, roce.lspci, network.addresses,
    network.routes, network.neighbours, network.ethtool_speed, network.nmcli_devices,
    network.socket_address, mdns.avahi_browse,
]  # fmt: skip
HOSTILE = [
    "",
    "\n\n\n",
    "[" * 100_000,
    '[{"ifname": 7, "addr_info": {"a": 1}, "dst": [], "lladdr": 3}]',
    '{"a": 1}',
    "9" * 5000,
    "-" * 70_000,
    "name\n" * 100,
    "=" * 5000 + ";" * 5000,
    "CA 'a'\nCA 'b'\n" * 50,
    "name, uuid\n" + "x" * 400_000 + ", y\n",
    "0000:01:00.0 \n\t\tLnkSta: Speed 1.2.3GT/s, Width x4\n",
    "0000:01:00.0 \n\t\tLnkSta: Speed " + "9" * 5000 + "GT/s, Width x4\n",
    string.printable * 50,
    "\u2028\u202e\x00\x1b[2J" * 100,
    "MemTotal: 99999999999999999999 kB\nMemAvailable: 1 kB\n",
    "Speed: 99999999999999Mb/s\n",
    "\\999\\12\\" * 200,
]


@pytest.mark.timeout(20)  # a pattern that backtracks would not come back
@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__name__)
def test_no_text_makes_a_parser_fail(parser) -> None:
    for hostile in HOSTILE:
        parser(hostile)
