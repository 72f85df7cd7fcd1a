"""From what two boxes say, a link that works, or a refusal that names both."""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Any

import pytest

from cluster import cable, link
from cluster.errors import RefusedError
from cluster.finding import Finding, Level
from cluster.inventory import Link
from cluster.link import LinkPlan
from tests.cluster.fixtures import PORTS, Profile, Spark

HUNDRED, HUNDRED_ONE = "192.168.100.0/24", "192.168.101.0/24"
FIRST, SECOND = PORTS[0]


def pair(**both: Any) -> tuple[Spark, Spark]:
    """Two boxes with the same state."""
    return Spark("spark-a", 1, **both), Spark("spark-b", 2, **both)


def planned(head: Spark, peer: Spark, **wish: Any) -> LinkPlan:
    return link.plan(head.facts(), peer.facts(), Link(**wish))


def refused(head: Spark, peer: Spark, **wish: Any) -> str:
    with pytest.raises(RefusedError) as error:
        planned(head, peer, **wish)
    assert error.value.fix
    return error.value.message


def addresses(plan: LinkPlan) -> list[str]:
    return [str(end.address) for rail in plan.rails for end in rail.ends]


def found(plan: LinkPlan, check: str) -> list[Finding]:
    return [finding for finding in plan.findings if finding.check == check]


def by_hand(head: Spark, peer: Spark, mtu: int = 1500) -> None:
    """What NVIDIA's playbook has an owner do."""
    for box, number in ((head, 10), (peer, 11)):
        box.configured((FIRST, f"192.168.100.{number}/24"), (SECOND, f"192.168.101.{number}/24"), mtu=mtu)


# Fresh boxes.


def test_fresh_boxes_get_nvidias_addresses_on_two_subnets() -> None:
    plan = planned(*pair())
    first, second = plan.rails
    assert [str(rail.subnet) for rail in plan.rails] == [HUNDRED, HUNDRED_ONE]
    assert addresses(plan) == ["192.168.100.10/24", "192.168.100.11/24", "192.168.101.10/24", "192.168.101.11/24"]
    assert (first.head.interface, first.head.hca, first.head.node) == ("enp1s0f0np0", "rocep1s0f0", "spark-a")
    assert (second.peer.interface, second.peer.hca, second.peer.node) == ("enP2p1s0f0np0", "roceP2p1s0f0", "spark-b")
    assert (first.index, second.index, first.mtu, second.mtu) == (0, 1, 9000, 9000)
    assert not plan.adopted
    assert plan.findings == ()
    assert plan.ends(1) == (first.peer, second.peer)


def test_the_cable_is_found_in_the_other_socket() -> None:
    plan = planned(*pair(cabled=(1,)))
    assert [end.interface for end in plan.ends(0)] == ["enp1s0f1np1", "enP2p1s0f1np1"]
    assert [end.hca for end in plan.ends(0)] == ["rocep1s0f1", "roceP2p1s0f1"]


def test_link_local_addresses_of_nvidias_older_playbook_are_not_a_link() -> None:
    head, peer = pair()
    head.addresses = {FIRST: ("169.254.1.1/16",), SECOND: ("169.254.1.2/16",)}
    peer.addresses = {FIRST: ("169.254.1.3/16",)}
    plan = planned(head, peer)
    assert addresses(plan)[0] == "192.168.100.10/24"
    assert plan.findings == ()


# Where the cable is.


def test_no_cable_is_refused_with_both_names() -> None:
    message = refused(*pair(cabled=()))
    assert "spark-a: port 0 has no carrier, port 1 has no carrier" in message
    assert "spark-b: port 0 has no carrier" in message


def test_a_cable_at_one_end_only_is_refused() -> None:
    assert "no cable between spark-a and spark-b" in refused(Spark(), Spark("spark-b", 2, cabled=()))


def test_different_sockets_work_and_are_told_of() -> None:
    plan = planned(Spark(cabled=(0,)), Spark("spark-b", 2, cabled=(1,)))
    assert (plan.rails[0].head.interface, plan.rails[0].peer.interface) == ("enp1s0f0np0", "enp1s0f1np1")
    (finding,) = found(plan, "port")
    assert finding.level is Level.WARN
    assert "port 0 of spark-a and port 1 of spark-b" in finding.evidence


def test_two_cables_take_port_0_and_are_told_of() -> None:
    plan = planned(*pair(cabled=(0, 1)))
    assert plan.rails[0].head.interface == "enp1s0f0np0"
    assert [finding.level for finding in found(plan, "cable")] == [Level.WARN]


def test_a_second_cable_to_somewhere_else_does_not_matter() -> None:
    plan = planned(Spark(cabled=(0, 1)), Spark("spark-b", 2, cabled=(1,)))
    assert plan.rails[0].head.interface == "enp1s0f1np1"
    assert plan.findings == ()


def test_the_inventory_may_name_the_socket() -> None:
    assert planned(*pair(cabled=(0, 1)), port=1).rails[0].head.interface == "enp1s0f1np1"
    message = refused(*pair(cabled=(0,)), port=1)
    assert "port 1 has no cable between spark-a and spark-b" in message
    assert "port 0 has a carrier" in message


def test_a_named_socket_whose_interfaces_are_set_down_is_planned_for() -> None:
    head, peer = pair(off=PORTS[0])
    message = refused(head, peer)
    assert "spark-a: port 0 is set down" in message
    plan = planned(head, peer, port=0)
    assert addresses(plan)[0] == "192.168.100.10/24"
    assert {finding.level for finding in found(plan, "twin")} == {Level.WARN}
    assert len(found(plan, "twin")) == 4


def test_a_dark_twin_is_half_a_link() -> None:
    plan = planned(Spark(), Spark("spark-b", 2, dark=(SECOND,)))
    (finding,) = found(plan, "twin")
    assert (finding.level, finding.node) == (Level.FAIL, "spark-b")
    assert f"{SECOND} has no carrier, though its twin {FIRST} has one" in finding.evidence


def test_a_box_without_roce_devices_is_refused() -> None:
    peer = Spark("spark-b", 2, changes={"roce": {}})
    assert refused(Spark(), peer).startswith("spark-b: no ConnectX-7")
    peer = Spark("spark-b", 2, unknown={"roce": "/sys/class/infiniband: Permission denied"})
    assert "Permission denied" in refused(Spark(), peer)


def test_a_socket_that_lacks_a_twin_is_refused() -> None:
    box = Spark("spark-b", 2)
    devices = {name: device for name, device in box.values()["roce"].items() if name != "roceP2p1s0f0"}
    box.changes = {"roce": devices}
    assert "spark-b: port 0 has 1 interface(s) (enp1s0f0np0), not two" in refused(Spark(), box)


def test_one_box_given_twice_is_refused() -> None:
    head, peer = Spark(), Spark("spark-b", 1)
    assert "spark-a and spark-b are the same machine" in refused(head, peer)
    copied = Spark("spark-b", 2, changes={"machine_id": head.values()["machine_id"]})  # a disk copied to a second box
    assert planned(head, copied).rails


def test_sockets_are_known_by_name_where_there_is_no_pci_address() -> None:
    box = Spark()
    devices = box.values()["roce"]
    for device in devices.values():
        device["uevent"] = None
    box.changes = {"roce": devices}
    names = {port: [twin.nic.name for twin in twins] for port, twins in cable.sockets(box.facts()).items()}
    assert names == {port: list(twins) for port, twins in enumerate(PORTS)}


def test_an_interface_whose_name_could_bite_is_not_used() -> None:
    box = Spark()
    evil = "a:\n  b"
    devices, nics = box.values()["roce"], box.values()["nics"]
    devices["rocep1s0f0"]["interfaces"] = [evil]
    nics[evil] = nics.pop(FIRST)
    box.changes = {"roce": devices, "nics": nics}
    assert [len(twins) for twins in cable.sockets(box.facts()).values()] == [1, 2]


# What is off with it.


def test_a_slow_cable_is_told_of() -> None:
    plan = planned(*pair(speed={FIRST: 100000}))
    assert [(finding.node, finding.level) for finding in found(plan, "speed")] == [
        ("spark-a", Level.WARN),
        ("spark-b", Level.WARN),
    ]
    assert "100000Mb/s" in found(plan, "speed")[0].evidence


def test_a_roce_device_that_is_down_under_a_carrier_is_told_of() -> None:
    box = Spark()
    devices = box.values()["roce"]
    devices["rocep1s0f0"]["ports"]["1"]["state"] = "1: DOWN"
    box.changes = {"roce": devices}
    (finding,) = found(planned(box, Spark("spark-b", 2)), "rdma")
    assert finding.level is Level.FAIL
    assert "rocep1s0f0 (enp1s0f0np0) is DOWN" in finding.evidence


def test_ibdev2netdev_is_asked_for_a_second_opinion() -> None:
    box = Spark(changes={"ibdev2netdev": f"rocep1s0f0 port 1 ==> {SECOND} (Up)\n"})
    (finding,) = found(planned(box, Spark("spark-b", 2)), "rdma")
    assert SECOND in finding.evidence


# Which subnets.


def test_a_subnet_that_something_else_has_is_left_to_it() -> None:
    peer = Spark("spark-b", 2, addresses={"docker0": ("192.168.100.1/24",)})
    plan = planned(Spark(), peer)
    assert [str(rail.subnet) for rail in plan.rails] == ["192.168.102.0/24", HUNDRED_ONE]
    (finding,) = found(plan, "subnet")
    assert finding.level is Level.OK
    assert "spark-b: docker0 has 192.168.100.1/24" in finding.evidence


def test_both_subnets_may_be_taken() -> None:
    head = Spark(addresses={"docker0": ("192.168.101.1/24",)}, routes=({"dst": "192.168.100.0/23", "dev": "wg0"},))
    plan = planned(head, Spark("spark-b", 2, addresses={"virbr0": ("192.168.103.1/24",)}))
    assert [str(rail.subnet) for rail in plan.rails] == ["192.168.102.0/24", "192.168.104.0/24"]


def test_a_vpn_to_a_whole_private_block_sends_the_rails_to_another() -> None:
    plan = planned(Spark(routes=({"dst": "192.168.0.0/16", "dev": "tun0"},)), Spark("spark-b", 2))
    assert [str(rail.subnet) for rail in plan.rails] == ["172.16.0.0/24", "172.16.1.0/24"]


def test_the_default_route_and_a_vpns_two_halves_of_the_world_take_nothing() -> None:
    routes = tuple({"dst": to, "dev": "tun0"} for to in ("default", "0.0.0.0/1", "128.0.0.0/1"))
    plan = planned(*pair(routes=routes))
    assert [str(rail.subnet) for rail in plan.rails] == [HUNDRED, HUNDRED_ONE]


def test_no_free_subnet_is_refused_with_what_takes_them() -> None:
    routes = tuple({"dst": to, "dev": "tun0"} for to in ("192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8"))
    message = refused(Spark(routes=routes), Spark("spark-b", 2))
    assert "spark-a: a route to 192.168.0.0/16 by tun0" in message
    assert "spark-b" in message


def test_the_inventorys_own_subnets_count() -> None:
    plan = planned(*pair(), subnets=(IPv4Network("10.1.0.0/30"), IPv4Network("10.2.0.0/16")))
    assert addresses(plan) == ["10.1.0.1/30", "10.1.0.2/30", "10.2.0.10/16", "10.2.0.11/16"]


def test_an_address_that_a_third_machine_has_is_passed_over() -> None:
    stranger = {"dst": "192.168.100.10", "dev": FIRST, "lladdr": "48:21:0b:03:09:00", "state": ["REACHABLE"]}
    head, peer = pair()
    head.neighbours = (stranger, {"dst": "192.168.101.10", "dev": SECOND, "lladdr": peer.mac(1), "state": ["STALE"]})
    assert addresses(planned(head, peer)) == [
        "192.168.100.11/24", "192.168.100.12/24", "192.168.101.10/24", "192.168.101.11/24",
    ]  # fmt: skip


def test_routes_that_cannot_be_seen_are_told_of() -> None:
    plan = planned(Spark(unknown={"routes": "ip: not installed"}), Spark("spark-b", 2))
    assert [(finding.level, finding.node) for finding in found(plan, "subnet")] == [(Level.UNKNOWN, "spark-a")]


# What is configured already.


@pytest.mark.parametrize("manager", ["NetworkManager", "networkd"])
def test_a_link_that_nvidias_playbook_made_is_adopted(manager: str) -> None:
    head, peer = pair(manager=manager)
    by_hand(head, peer)
    plan = planned(head, peer)
    assert plan.adopted
    assert addresses(plan) == ["192.168.100.10/24", "192.168.100.11/24", "192.168.101.10/24", "192.168.101.11/24"]
    assert plan.rails[0].mtu == 1500
    assert [finding.level for finding in found(plan, "mtu")] == [Level.WARN]


def test_planning_again_after_up_changes_nothing() -> None:
    head, peer = pair(addresses={"docker0": ("192.168.100.1/24",)})
    before = planned(head, peer, subnets=(IPv4Network(HUNDRED), IPv4Network(HUNDRED_ONE)), mtu=9000)
    for rank, box in enumerate((head, peer)):
        box.configured(*((end.interface, str(end.address)) for end in before.ends(rank)), mtu=9000)
    after = planned(head, peer, subnets=(IPv4Network(HUNDRED), IPv4Network(HUNDRED_ONE)), mtu=9000)
    assert after.rails == before.rails
    assert after.adopted
    assert planned(head, peer).adopted


def test_addresses_on_swapped_twins_are_adopted_too() -> None:
    head, peer = pair()
    head.configured((FIRST, "10.0.0.1/24"), (SECOND, "10.0.1.1/24"))
    peer.configured((FIRST, "10.0.1.2/24"), (SECOND, "10.0.0.2/24"))
    plan = planned(head, peer)
    assert plan.adopted
    assert [(rail.head.interface, rail.peer.interface) for rail in plan.rails] == [(FIRST, SECOND), (SECOND, FIRST)]
    assert plan.rails[0].peer.hca == "roceP2p1s0f0"


def test_the_cabled_socket_that_is_configured_goes_before_the_first() -> None:
    head, peer = pair(cabled=(0, 1))
    for box, number in ((head, 1), (peer, 2)):
        box.configured((PORTS[1][0], f"10.0.0.{number}/24"), (PORTS[1][1], f"10.0.1.{number}/24"))
    plan = planned(head, peer)
    assert plan.adopted
    assert plan.rails[0].head.interface == "enp1s0f1np1"
    assert "the link takes port 1" in found(plan, "cable")[0].evidence


def test_what_the_inventory_says_in_so_many_words_goes_before_what_is_there() -> None:
    head, peer = pair()
    by_hand(head, peer)
    plan = planned(head, peer, mtu=9000)
    assert not plan.adopted
    assert plan.rails[0].mtu == 9000
    assert "MTU of 9000" in found(plan, "adoption")[0].evidence
    plan = planned(head, peer, subnets=(IPv4Network("10.1.0.0/24"), IPv4Network("10.2.0.0/24")))
    assert not plan.adopted
    assert addresses(plan)[0] == "10.1.0.10/24"


def test_two_mtus_on_one_rail_are_not_adopted() -> None:
    head, peer = pair()
    by_hand(head, peer)
    peer.mtu[SECOND] = 9000
    plan = planned(head, peer)
    assert not plan.adopted
    assert "the MTU is 1500 at one end of 192.168.101.0/24 and 9000 at the other" in found(plan, "adoption")[0].evidence


def test_twins_on_one_subnet_are_not_adopted() -> None:
    head, peer = pair()
    for box, number in ((head, 10), (peer, 20)):
        box.configured((FIRST, f"192.168.100.{number}/24"), (SECOND, f"192.168.100.{number + 1}/24"))
    plan = planned(head, peer)
    assert not plan.adopted
    assert [str(rail.subnet) for rail in plan.rails] == [HUNDRED, HUNDRED_ONE]
    assert [finding.node for finding in found(plan, "subnet")] == ["spark-a", "spark-b"]


def test_a_subnet_of_the_link_that_a_bridge_has_too_is_not_adopted() -> None:
    head, peer = pair()
    by_hand(head, peer)
    head.addresses["docker0"] = ("192.168.101.1/24",)
    plan = planned(head, peer)
    assert not plan.adopted
    assert str(plan.rails[1].subnet) == "192.168.102.0/24"


def test_addresses_set_with_ip_addr_do_not_last_and_are_not_adopted() -> None:
    head, peer = pair()
    for box, number in ((head, 10), (peer, 11)):
        box.addresses = {FIRST: (f"192.168.100.{number}/24",), SECOND: (f"192.168.101.{number}/24",)}
    plan = planned(head, peer)
    assert not plan.adopted
    assert len(found(plan, "address")) == 4
    assert "192.168.100.10/24 of enp1s0f0np0 is in no configuration" in found(plan, "address")[0].evidence


def test_one_configured_box_is_not_a_link() -> None:
    head, peer = pair()
    head.configured((FIRST, "192.168.100.10/24"), (SECOND, "192.168.101.10/24"))
    assert not planned(head, peer).adopted


def test_the_same_address_at_both_ends_is_not_a_link() -> None:
    head, peer = pair()
    for box in (head, peer):
        box.configured((FIRST, "192.168.100.10/24"), (SECOND, "192.168.101.10/24"))
    plan = planned(head, peer)
    assert not plan.adopted
    assert addresses(plan)[:2] == ["192.168.100.10/24", "192.168.100.11/24"]


def test_a_configuration_that_is_not_applied_is_adopted_and_told_of() -> None:
    head, peer = pair()
    by_hand(head, peer)
    del peer.addresses[SECOND]
    plan = planned(head, peer)
    assert plan.adopted
    (finding,) = found(plan, "address")
    assert (finding.node, finding.fix) == ("spark-b", "sudo netplan apply")


def test_who_configures_an_interface_may_be_unknown() -> None:
    head, peer = pair()
    head.unknown = {"networkmanager": "nmcli: not done after 4 s"}
    plan = planned(head, peer)
    assert not plan.adopted
    assert {(finding.level, finding.node) for finding in found(plan, "address")} == {(Level.UNKNOWN, "spark-a")}


def test_of_several_profiles_only_the_active_one_counts() -> None:
    head, peer = pair()
    by_hand(head, peer)
    old = Profile(FIRST, ("10.9.9.9/24",), "/etc/NetworkManager/system-connections/old.nmconnection", active=False)
    head.profiles += (old,)
    assert planned(head, peer).adopted
