"""Cables, carrier, addresses and power behave as between two boxes on a desk."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.lab import Host, Lab, PoweredOffError, eventually

PORT = "/sys/class/infiniband/rocep1s0f0/ports/1"
NETPLAN = """\
network:
  version: 2
  renderer: {renderer}
  ethernets:
    enp1s0f0np0: {{addresses: [192.168.100.{number}/24], mtu: 9000, dhcp4: no, dhcp6: no, link-local: []}}
    enP2p1s0f0np0: {{addresses: [192.168.101.{number}/24], mtu: 9000, dhcp4: no, dhcp6: no, link-local: []}}
"""


def reaches(host: Host, address: str, *options: str) -> bool:
    return host.run(["ping", "-c", "1", "-W", "1", *options, address], check=False).returncode == 0


def listens(host: Host, port: int) -> bool:
    return f":{port} " in host.run(["ss", "-ltn"]).stdout


# The network.


def test_netplan_gives_addresses_through_networkmanager(pair: Lab) -> None:
    check_netplan(pair, "NetworkManager")
    owners = pair.hosts[0].run(["nmcli", "-g", "DEVICE,CONNECTION", "device"]).stdout.splitlines()
    assert "enp1s0f0np0:netplan-enp1s0f0np0" in owners
    assert "enP7s7:enP7s7" in owners


def test_netplan_gives_addresses_through_networkd() -> None:
    with Lab(network="networkd") as lab:
        assert all(host.carrier(rail) for host in lab.hosts for rail in host.rails)
        check_netplan(lab, "networkd")


def check_netplan(lab: Lab, renderer: str) -> None:
    head, peer = lab.hosts
    for number, host in ((10, head), (11, peer)):
        text = NETPLAN.format(renderer=renderer, number=number)
        host.write("/etc/netplan/40-cx7.yaml", text, user="root", mode=0o600)
        host.run(["netplan", "apply"], "root")
    eventually(lambda: reaches(head, "192.168.100.11", "-M", "do", "-s", "8972"))
    eventually(lambda: reaches(head, "192.168.101.11", "-M", "do", "-s", "8972"))
    gid = "0000:0000:0000:0000:0000:ffff:c0a8:640a\n"
    eventually(lambda: gid in head.run(["sh", "-c", f"cat {PORT}/gids/*"]).stdout)
    assert head.read(f"{PORT}/gid_attrs/ndevs/0") == b"enp1s0f0np0\n"
    assert lab.ssh(head, "true").returncode == 0, "netplan took the management network"


def test_a_cut_cable_drops_carrier_at_both_ends_only(simple: Lab) -> None:
    head, peer = simple.hosts
    assert (head.rails[0], peer.rails[0]) == ("enp1s0f0np0", "enp1s0f1np1")
    simple.cut(0)
    for host in simple.hosts:
        (link,) = json.loads(host.run(["ip", "-j", "link", "show", host.rails[0]]).stdout)
        assert {"UP", "NO-CARRIER"} <= set(link["flags"])
        assert host.carrier(host.rails[1])
    eventually(lambda: head.read(f"{PORT}/state") == b"1: DOWN\n")
    assert head.read(f"/sys/class/net/{head.rails[0]}/speed") == b"-1\n"
    assert "Speed: Unknown!" in head.run(["ethtool", head.rails[0]]).stdout
    simple.cut()
    assert not head.carrier(head.rails[1])
    assert not peer.carrier(peer.rails[1])
    simple.heal()
    eventually(lambda: reaches(head, "10.0.0.2"))


def test_an_interface_taken_down_darkens_the_other_end(simple: Lab) -> None:
    head, peer = simple.hosts
    head.run(["ip", "link", "set", head.rails[1], "down"], "root")
    eventually(lambda: not peer.carrier(peer.rails[1]))
    head.run(["ip", "link", "set", head.rails[1], "up"], "root")
    eventually(lambda: peer.carrier(peer.rails[1]))


def test_a_slow_rail_carries_what_it_may_and_counters_tell(simple: Lab) -> None:
    head, peer = simple.hosts
    simple.slow(0, 80)
    before = head.counters(head.rails[0]).sent
    assert 20 < throughput(head, peer) < 85
    assert 1e6 < head.counters(head.rails[0]).sent - before < 2e7
    simple.slow(0, None)
    assert throughput(head, peer) > 200


def throughput(head: Host, peer: Host) -> float:
    """Mbit/s over the first rail of ``simple``."""
    server = peer.start(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
    eventually(lambda: listens(peer, 5201))
    shown = json.loads(head.run(["iperf3", "-J", "-c", "10.0.0.2", "-t", "1"]).stdout)
    assert server.wait(5) == 0
    return float(shown["end"]["sum_received"]["bits_per_second"]) / 1e6


def test_management_can_go_while_the_link_stays(simple: Lab) -> None:
    head = simple.hosts[0]
    head.management(False)
    assert not head.carrier("enP7s7")
    assert reaches(head, "10.0.0.2")
    head.management(True)
    head.wait_ssh()


def test_hosts_announce_ssh_by_mdns(pair: Lab) -> None:
    head, peer = pair.hosts

    def found() -> bool:
        browsed = head.run(["avahi-browse", "-p", "-r", "-f", "-t", "_ssh._tcp"], check=False).stdout
        return any(
            line.startswith("=;enP7s7;IPv4;") and f";{peer.address};22;" in line for line in browsed.splitlines()
        )

    eventually(found, 15)


def test_a_firewall_closes_all_but_ssh(pair: Lab) -> None:
    head, peer = pair.hosts
    server = peer.start(["python3", "-m", "http.server", "8000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    connect = ["timeout", "0.5", "bash", "-c", f"</dev/tcp/{peer.address}/8000"]
    eventually(lambda: listens(peer, 8000))
    assert head.run(connect, check=False).returncode == 0
    peer.firewall(True)
    assert head.run(connect, check=False).returncode
    assert pair.ssh(peer, "true").returncode == 0
    peer.firewall(False)
    assert head.run(connect, check=False).returncode == 0
    server.kill()


def test_a_subnet_can_be_taken(simple: Lab) -> None:
    host = simple.hosts[0]
    host.take_subnet("192.168.100.1/24")
    assert "192.168.100.1/24" in host.run(["ip", "-br", "addr", "show", "docker0"]).stdout


# Power.


def test_a_power_cut_says_no_goodbye_on_the_wire(pair: Lab) -> None:
    head, peer = pair.hosts
    accept = "import socket; s = socket.create_server(('', 7000)); c, _ = s.accept(); print('in', flush=True); print(c.recv(1))"
    server = peer.start(["python3", "-c", accept], stdout=subprocess.PIPE, text=True)
    eventually(lambda: listens(peer, 7000))
    connect = f"import socket, time; s = socket.create_connection(('{peer.address}', 7000)); time.sleep(1000)"
    head.start(["python3", "-c", connect])
    assert server.stdout
    assert server.stdout.readline() == "in\n"
    pids = head.pids()
    head.power_off()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not peer.carrier(peer.rails[0])
    assert "ESTAB" in peer.run(["ss", "-tn", "sport", "= :7000"]).stdout
    assert server.poll() is None
    with pytest.raises(PoweredOffError):
        head.run(["true"])
    server.kill()
    head.power_on()
    assert peer.carrier(peer.rails[0])


def test_a_lingering_users_unit_returns_after_a_power_cut(pair: Lab) -> None:
    host = pair.hosts[0]
    host.run(["loginctl", "enable-linger", "spark"], "root")
    eventually(lambda: host.run(["systemctl", "--user", "is-system-running"], check=False).stdout == "running\n")
    unit = "[Service]\nExecStart=/bin/sleep 777\n[Install]\nWantedBy=default.target\n"
    host.write("/home/spark/.config/systemd/user/beat.service", unit)
    host.run(["systemctl", "--user", "enable", "--now", "beat"])
    host.power_off()
    host.power_on()
    eventually(lambda: any(process.argv == ("/bin/sleep", "777") for process in host.processes()))
    host.run(["systemctl", "--user", "disable", "--now", "beat"])


def test_a_reboot_keeps_the_disk_and_forgets_the_rest(pair: Lab) -> None:
    host = pair.hosts[1]
    host.write("/home/spark/kept", "1")
    host.write("/tmp/gone", "1")
    host.run(["ip", "link", "set", "enp1s0f1np1", "mtu", "4000"], "root")
    host.start(["sleep", "1000"])
    host.reboot()
    assert host.read("/home/spark/kept") == b"1"
    assert host.read("/sys/class/net/enp1s0f1np1/mtu") == b"1500\n"
    with pytest.raises(FileNotFoundError):
        host.read("/tmp/gone")


def test_a_host_started_from_a_thread_outlives_the_thread(simple: Lab) -> None:
    peer = simple.hosts[1]
    peer.power_off()
    thread = threading.Thread(target=peer.power_on)
    thread.start()
    thread.join()
    time.sleep(0.1)
    answer = simple.ssh(peer, "hostname")
    assert answer.stdout == "peer\n", answer.stderr
