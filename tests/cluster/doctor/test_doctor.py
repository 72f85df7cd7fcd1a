"""A healthy pair gives nothing to do; every known way to break is seen, by the check that is named for it and by no other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cluster.doctor import CHECKS, ENTRIES, Clock, Log
from cluster.facts import Unknown
from cluster.finding import Finding, Level
from cluster.inventory import EMBEDDED
from tests.cluster.doctor.pair import (
    CODE,
    FIRST,
    HCAS,
    HOME,
    PACKAGES,
    SECOND,
    UNITS,
    bad,
    box,
    examined,
    fact,
    inventory,
    measured,
    of,
    runs,
)
from tests.cluster.fixtures import Spark
from tests.cluster.fixtures.spark import text

BUSY = "NVIDIA GB10, GPU-0, 580.126.09, [N/A], 61, 96 %, {watts}, {clock} MHz, 3003 MHz, P0, {reasons}\n"
MEMINFO = text("meminfo-2026")


def test_a_healthy_pair_gives_nothing_to_do() -> None:
    findings = examined()
    assert bad(findings) == []
    assert [(one.check, one.node) for one in findings if one.level is Level.UNKNOWN] == [
        ("gpu clock", "spark-a"), ("gpu clock", "spark-b"),  # idle
    ]  # fmt: skip


def test_every_check_gives_a_finding_of_each_of_its_names() -> None:
    given = {finding.check for finding in examined()}
    assert given <= {name for check in CHECKS for name in check.names}
    for check in CHECKS:
        assert given & set(check.names), check.names


def test_a_box_as_it_comes_is_told_what_freezes_it_and_that_the_pair_is_not_up() -> None:
    findings = examined(Spark("spark-a", 1), Spark("spark-b", 2), measurement=None)
    assert {finding.check for finding in bad(findings)} == {"swap", "earlyoom", "address"}
    assert {finding.level for finding in bad(findings)} == {Level.WARN}


# What breaks, by the numbers of the list of public facts.


@dataclass
class Broken:
    """One thing broken: the arguments of `examined`, and what the finding must be and say."""

    entry: int
    check: str
    level: Level
    says: str
    given: dict[str, Any]
    also: tuple[str, ...] = ()  # what follows from it


def gpu(**row: str) -> dict[str, Any]:
    header = text("nvidia-smi.csv").splitlines()[0]
    row = {"watts": "31.00 W", "clock": "611", "reasons": "0x0000000000000000"} | row
    return {"head": box(0, changes={"gpu": f"{header}\n{BUSY.format(**row)}"})}


def drop_gid(rank: int) -> dict[str, Any]:
    devices = fact(rank, "roce")
    devices[HCAS[1]]["ports"]["1"]["gids"] = []
    return {"peer": box(rank, changes={"roce": devices})}


def narrow(rank: int) -> dict[str, Any]:
    links = {address: dict(link) for address, link in fact(rank, "pcie").items()}
    links["0002:01:00.0"]["current_link_width"] = "2"
    return {"peer": box(rank, changes={"pcie": links})}


def packages(**versions: str) -> dict[str, Any]:
    return {"packages": PACKAGES | {"distributions": PACKAGES["distributions"] | versions}}


def one_subnet() -> dict[str, Any]:
    head, peer = Spark("spark-a", 1, changes=box(0).changes), Spark("spark-b", 2, changes=box(1).changes)
    for spark, number in ((head, 10), (peer, 20)):
        spark.configured((FIRST, f"192.168.100.{number}/24"), (SECOND, f"192.168.100.{number + 1}/24"), mtu=9000)
    return {"head": head, "peer": peer}


def fleeting() -> dict[str, Any]:
    head = Spark("spark-a", 1, changes=box(0).changes, mtu={FIRST: 9000, SECOND: 9000})
    head.addresses = {FIRST: ("192.168.100.10/24",), SECOND: ("192.168.101.10/24",)}
    return {"head": head}


def measured_at(*rates: float, **other: Any) -> dict[str, Any]:
    return {"measurement": measured((rates[0], rates[1]), **other)}


def collective(bus: float) -> dict[str, Any]:
    taken = measured()
    assert taken.collective is not None
    return {"measurement": taken.with_collective(replace(taken.collective, bus=bus))}


def lost_packets() -> dict[str, Any]:
    taken = measured()
    full = replace(taken.pings[2], received=0, error="message too long, mtu=1500")
    small = replace(full, size=84, received=3, error="")
    return {"measurement": replace(taken, pings=(*taken.pings[:2], full, taken.pings[3], small))}


def ufw(rules: str | None = None) -> dict[str, Any]:
    changes = {"ufw": "ENABLED=yes\n", "nft": rules}
    return {"head": box(0, changes=changes), "measurement": None}


def on_head(**changes: Any) -> dict[str, Any]:
    return {"head": box(0, changes=changes)}


def on_peer(**changes: Any) -> dict[str, Any]:
    return {"peer": box(1, changes=changes)}


def says(line: str) -> dict[str, Any]:
    return {"logs": [Log("spark-a", "rank0.log", f"all is well\n{line}\n")]}


def env(**variables: str) -> dict[str, Any]:
    return {"inventory": inventory(variables)}


def no_gpu(reason: str, module: str | None) -> dict[str, Any]:
    return {"head": box(0, unknown={"gpu": f"nvidia-smi: exit status 9: {reason}"}, changes={"nvidia_module": module})}


def without_cma() -> dict[str, Any]:
    changes = {"kernel": "7.0.0-1019-nvidia\n", "meminfo": re.sub(r"CmaTotal: +\d+", "CmaTotal: 0", MEMINFO)}
    return {"head": box(0, changes=changes), "peer": box(1, changes=changes)}


def warm_cache() -> str:
    free, available = 30 << 20, 110 << 20  # kB
    text = re.sub(r"MemFree: +\d+", f"MemFree: {free}", MEMINFO)
    return re.sub(r"MemAvailable: +\d+", f"MemAvailable: {available}", text)


def newer_driver() -> dict[str, Any]:
    return on_peer(gpu=text("nvidia-smi.csv").replace("580.126.09", "580.159.03"), nvidia_module="580.159.03\n")


def newer_firmware() -> dict[str, Any]:
    return on_peer(roce=json.loads(json.dumps(fact(1, "roce")).replace("28.45.4028", "28.45.9999")))


DROPPING = "table ip filter {\n chain INPUT {\n type filter hook input priority filter; policy drop;\n }\n"
SWAP = {"swaps": "Filename\n/swap.img file 16777212 0 -2\n"}
NO_EARLYOOM = UNITS.replace("active\nUnitFileState=enabled\n", "inactive\n")
SMALL_LIMIT = {"memlock": [8 << 20, 8 << 20], "nofile": [1024, 1024]}
OLD_NCCL = {"nvidia-nccl-cu13": "2.28.3"}
VLLM = "ValueError: Free memory on device (31/119 GiB) on startup is less than desired GPU memory utilization"
GID = "NCCL WARN Call to ibv_modify_qp failed with 61 No data available"
ENOMEM = "NCCL WARN Call to ibv_reg_mr failed with error Cannot allocate memory"

FAIL, WARN = Level.FAIL, Level.WARN
BREAKS = [
    Broken(1, "bandwidth", FAIL, r"26\.1 Gb/s.*not initialised", measured_at(13.1, 13.0)),
    Broken(2, "collective", FAIL, r"3\.1 GB/s.*RDMA gives 190", collective(3.1)),
    Broken(3, "collective", FAIL, r"11\.8 GB/s.*one twin", collective(11.8)),
    Broken(3, "hca", FAIL, f"leaves out {HCAS[1]}", env(NCCL_IB_HCA=HCAS[0])),
    Broken(3, "hca", FAIL, "is an interface", env(NCCL_IB_HCA=f"{FIRST},{SECOND}")),
    Broken(3, "bandwidth", FAIL, r"98\.0 Gb/s.*next to nothing", measured_at(98.0, 0.0)),
    Broken(3, "bandwidth", FAIL, r"98\.0 Gb/s.*one twin gives alone", measured_at(49.0, 49.0)),
    Broken(4, "swap", WARN, r"16\.0 GiB of swap", on_head(**SWAP, earlyoom='EARLYOOM_ARGS="-m 2"\n')),
    Broken(4, "earlyoom", WARN, "does not run", on_head(units=NO_EARLYOOM)),
    Broken(4, "earlyoom", WARN, "less than 12 GiB", on_head(earlyoom='EARLYOOM_ARGS="-r 3600"\n')),
    Broken(4, "sshd", WARN, "OOMScoreAdjust=0", on_head(units=UNITS.replace("-1000", "0"))),
    Broken(4, "kernel log", WARN, "process 4711", on_head(dmesg="Out of memory: Killed process 4711 (python)")),
    Broken(5, "page cache", WARN, r"has 80\.0 GiB.*see only 30\.0 GiB free", on_head(meminfo=warm_cache())),
    Broken(5, "logs", WARN, "page cache", says(VLLM)),
    Broken(6, "gid", FAIL, rf"{HCAS[1]} has no RoCE v2 GID for 192\.168\.101\.11", drop_gid(1)),
    Broken(6, "gid", FAIL, "NCCL_IB_GID_INDEX=3", env(NCCL_IB_GID_INDEX="3")),
    Broken(6, "logs", FAIL, "a GID that has moved", says(GID)),
    Broken(7, "subnet", WARN, r"both on 192\.168\.100\.0/24", one_subnet(), ("address",)),
    Broken(8, "address", WARN, "in no configuration", fleeting()),
    Broken(9, "firewall", FAIL, r"no rule lets 192\.168\.100\.0/24 and 192\.168\.101\.0/24", ufw(DROPPING)),
    Broken(10, "driver", FAIL, "update is half done", no_gpu("Driver/library version mismatch", "580.126.09\n")),
    Broken(10, "driver", FAIL, "no module nvidia", no_gpu("couldn't communicate with the NVIDIA driver", None)),
    Broken(10, "driver", FAIL, r"580\.126\.09.*580\.159\.03", on_head(nvidia_module="580.159.03\n")),
    Broken(10, "driver", WARN, "no /dev/nvidiactl", on_head(devices=["infiniband/uverbs0"])),
    Broken(11, "pcie", FAIL, "0002:01:00.0 runs at 32 GT/s x2", narrow(1)),
    Broken(12, "gpu clock", FAIL, "611 MHz at 96 %, 31 W", gpu()),
    Broken(12, "gpu clock", WARN, "heat", gpu(reasons="0x0000000000000040")),
    Broken(12, "gpu clock", WARN, "611 MHz at 96 %,", gpu(watts="[Unknown Error]")),
    Broken(13, "cma", FAIL, "CmaTotal is 0 kB with kernel 7.0.0-1019", without_cma()),
    Broken(13, "memlock", WARN, "8192 KiB", on_head(limits=SMALL_LIMIT)),
    Broken(13, "logs", FAIL, "cannot register memory", says(ENOMEM)),
    Broken(15, "driver version", WARN, "580.126.09 on spark-a and 580.159.03 on spark-b", newer_driver()),
    Broken(15, "cuda", WARN, "13.0.2 on spark-a and none on spark-b", on_peer(cuda={"files": {}, "nvcc": None})),
    Broken(15, "kernel", WARN, "1008-nvidia on spark-a and 6.17.0-1014", on_peer(kernel="6.17.0-1014-nvidia\n")),
    Broken(15, "firmware", WARN, "28.45.4028 on spark-a and 28.45.9999", newer_firmware()),
    Broken(15, "nccl", FAIL, "2.30.4 on spark-a and 2.28.3", on_peer(**packages(**OLD_NCCL))),
    Broken(15, "torch", FAIL, "2.13.0 on spark-a and 2.12.1", on_peer(**packages(torch="2.12.1"))),
    Broken(15, "transformers", FAIL, "5.23.0 on spark-a and 5.22.0", on_peer(**packages(transformers="5.22.0"))),
    Broken(16, "names", WARN, "both boxes are named spark-a", on_peer(hostname="spark-a")),
    Broken(16, "ssh folder", WARN, "there is no ~/.ssh", on_peer(ssh_folder=None)),
    Broken(16, "ssh folder", FAIL, "mode 777", on_peer(ssh_folder=0o777)),
    Broken(17, "mtu", FAIL, "9000 bytes from spark-a 0 of 3 come back.*mtu=1500", lost_packets()),
    Broken(
        17, "mtu", FAIL, r"9000 on spark-a's \S+ and 1500 on spark-b's", {"peer": box(1, mtu=1500), "measurement": None}
    ),
]


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: f"{broken.entry}-{broken.check}")
def test_what_breaks_is_seen_and_nothing_else(broken: Broken) -> None:
    findings = bad(examined(**broken.given))
    assert {finding.check for finding in findings} == {broken.check, *broken.also}
    assert {finding.level for finding in findings} == {broken.level}
    assert any(re.search(broken.says, finding.evidence) for finding in findings), [one.evidence for one in findings]
    for finding in findings:
        assert finding.fix
        assert finding.evidence.isprintable()
        assert len(finding.evidence) < 300


def test_every_entry_of_the_list_is_seen_or_there_is_a_reason_why_not() -> None:
    assert [entry.number for entry in ENTRIES] == list(range(1, 18))
    names = {name for check in CHECKS for name in check.names}
    seen = {(broken.entry, broken.check) for broken in BREAKS}
    for entry in ENTRIES:
        assert bool(entry.checks) != bool(entry.unseen), entry
        assert set(entry.checks) <= names
        if entry.checks:
            assert any((entry.number, check) in seen for check in entry.checks), entry
    assert [entry.number for entry in ENTRIES if entry.unseen] == [14]


# What else must be alike, and what cannot be seen.


def test_our_own_code_must_be_on_both() -> None:
    old = HOME | {"code": ["fedcba9876543210"]}
    (finding,) = bad(examined(peer=box(1, changes={"sparkctl": old})))
    assert (finding.check, finding.evidence) == ("code", f"our code {CODE} is not on spark-b")
    none = {"sparkctl": HOME | {"code": []}}
    (finding,) = of(examined(box(0, changes=none), box(1, changes=none)), "code")
    assert (finding.level, finding.fix) == (Level.UNKNOWN, "sparkctl up")


@pytest.mark.parametrize(
    ("ahead", "within", "level"),
    [(1.5, 0.2, Level.OK), (31.0, 0.2, Level.FAIL), (-31.0, 0.2, Level.FAIL), (1.5, 3.0, Level.UNKNOWN)],
)
def test_clocks_agree_within_two_seconds(ahead: float, within: float, level: Level) -> None:
    (finding,) = of(examined(clocks=(Clock(ahead, within), Clock(0.0, 0.0))), "clock")
    assert finding.level is level
    assert f"{abs(ahead):.1f} s ahead of {'spark-b' if ahead > 0 else 'spark-a'}'s" in finding.evidence


def test_a_clock_without_a_time_server_runs_away() -> None:
    changes = {"timedatectl": text("timedatectl-show").replace("NTPSynchronized=yes", "NTPSynchronized=no")}
    assert [one.check for one in bad(examined(box(0, changes=changes)))] == ["time server"]


def test_a_node_that_cannot_be_reached_fails_once_and_leaves_the_rest_unknown() -> None:
    findings = examined(peer=Unknown("spark-b: no route to host"))
    (finding,) = bad(findings)
    assert (finding.check, finding.level, finding.node) == ("node", Level.FAIL, "spark-b")
    for check in ("torch", "mtu", "cable", "code"):
        assert [one.level for one in of(findings, check)][:1] == [Level.UNKNOWN], check
        assert "spark-b" in of(findings, check)[0].evidence
    assert of(findings, "driver")[0].level is Level.OK


def test_no_cable_is_told_in_the_plans_own_words() -> None:
    findings = examined(box(0, cabled=()), box(1, cabled=()), measurement=None)
    assert [(one.check, one.level) for one in bad(findings)] == [("cable", Level.FAIL)]
    assert "no cable between spark-a and spark-b" in bad(findings)[0].evidence


@pytest.mark.parametrize("name", sorted(box(0).values()))
def test_what_cannot_be_looked_at_is_unknown_and_not_failed(name: str) -> None:
    findings = examined(box(0, unknown={name: "it hangs"}))
    assert bad(findings) == []


def test_hidden_versions_say_why() -> None:
    findings = examined(peer=box(1, unknown={"gpu": "nvidia-smi: not installed", "nvidia_module": "it hangs"}))
    (finding,) = of(findings, "driver version")
    assert finding.level is Level.UNKNOWN
    assert "spark-b: nvidia-smi: not installed" in finding.evidence


def test_the_embedded_pair_has_no_cable_and_is_looked_at_once() -> None:
    facts = Spark("left", 1).facts()
    findings = examined(facts, facts, inventory=EMBEDDED, measurement=None, clocks=None)
    assert of(findings, "cable")[0].level is Level.OK
    assert [one.node for one in of(findings, "memory")] == ["left"]


# Details of single checks.


def judged(check: str, **given: Any) -> list[tuple[Level, str]]:
    return [(one.level, one.evidence) for one in of(examined(**given), check)]


def test_a_firewall_counts_by_its_rules_then_by_what_passed() -> None:
    open_to = [f"  ip saddr 192.168.10{rail}.0/24 counter packets 0 bytes 0 accept\n" for rail in (0, 1)]
    assert judged("firewall", **ufw(DROPPING + "".join(open_to)))[0][0] is Level.OK
    assert judged("firewall", **ufw(DROPPING + open_to[0]))[0] == (
        Level.FAIL,
        "ufw is on, and no rule lets 192.168.101.0/24 in",
    )
    assert judged("firewall", **ufw(DROPPING + "  ip saddr 192.168.0.0/16 accept\n"))[0][0] is Level.OK
    only_ssh = "  ip saddr 192.168.0.0/16 tcp dport 22 accept\n"
    assert judged("firewall", **ufw(DROPPING + only_ssh))[0][0] is Level.FAIL
    hidden = {"head": box(0, changes={"ufw": "ENABLED=yes\n"}, unknown={"nft": "nft: Operation not permitted"})}
    (finding,) = [one for one in of(examined(**hidden, measurement=None), "firewall") if one.node == "spark-a"]
    assert finding.level is Level.UNKNOWN
    assert "sudo ufw allow from 192.168.100.0/24 && sudo ufw allow from 192.168.101.0/24" in finding.fix
    assert judged("firewall", **hidden)[0] == (Level.OK, "ufw is on, and streams came in on both rails")


@pytest.mark.parametrize(
    ("setting", "level"),
    [(",".join(HCAS), Level.OK), ("roce", Level.OK), (f"={HCAS[0]}:1,{HCAS[1]}:1", Level.OK), ("=roce", Level.FAIL),
     ("^mlx5_0", Level.OK), (f"^{HCAS[0]}", Level.FAIL)],
)  # fmt: skip
def test_nccl_reads_its_list_of_devices_in_three_ways(setting: str, level: Level) -> None:
    findings = examined(inventory=inventory({"NCCL_IB_HCA": setting}))
    assert {one.level for one in of(findings, "hca")} == {level}


def test_earlyoom_makes_up_for_swap() -> None:
    assert judged("swap", **on_head(**SWAP))[0][0] is Level.OK


def test_memory_that_is_taken_says_by_whom() -> None:
    taken = {
        "meminfo": re.sub(r"MemAvailable: +\d+", "MemAvailable: 9437184", MEMINFO).replace(
            "SwapFree:       16777212", "SwapFree: 0"
        )
    }
    level, evidence = judged("memory", head=box(0, changes=taken))[0]
    assert level is Level.WARN
    assert evidence == "9.0 of 121.7 GiB can be had; on the GPU: sglang::scheduler (94 GiB)"
    huge = {"meminfo": text("meminfo-2025-huge-pages")}
    assert "huge pages" in judged("memory", head=box(0, changes=huge))[0][1]


def test_the_measurement_of_another_link_says_nothing() -> None:
    taken = measured()
    stale = replace(taken, wires=(replace(taken.wires[0], mtu=1500), taken.wires[1]))
    (finding,) = of(examined(measurement=stale), "bandwidth")
    assert (finding.level, finding.fix) == (Level.UNKNOWN, "sparkctl bench link")
    assert of(examined(measurement=None), "bandwidth")[0].evidence == "the link has not been measured"


def test_logs_are_quoted_once_each_with_their_last_line() -> None:
    lines = "\n".join(f"[{number}] transport retry counter exceeded" for number in range(5))
    findings = of(examined(logs=[Log("spark-a", "rank0.log", lines + "\nbye")]), "logs")
    assert len(findings) == 1
    assert findings[0].evidence.endswith("rank0.log says (5 times): [4] transport retry counter exceeded")
    assert judged("logs", logs=[Log("spark-a", "a", "all is well\x1b[31m")])[0][0] is Level.OK


BANDWIDTHS: list[tuple[Callable[[], Any], Level, str]] = [
    (lambda: measured((92.57, 97.28)), Level.OK, r"^189\.[89] Gb/s over both rails \(92\.6 \+ 97\.3\).*the bar is 160$"),
    (lambda: measured((6.5, 6.5)), Level.FAIL, "not|slow"),
    (lambda: measured((0.47, 0.47)), Level.FAIL, "1 Gb/s management network"),
    (lambda: measured((4.7, 4.7)), Level.FAIL, "10 Gb/s management network"),
    (lambda: measured((97.0, 40.0)), Level.FAIL, rf"rail 1 \({SECOND}\) is the slow one"),
    (lambda: measured((70.0, 70.0)), Level.FAIL, "both rails are slow"),
    (lambda: measured(runs=runs("rdma", (70.0, 70.0))[:2] + runs("rdma", (97.0, 97.0))[2:]), Level.FAIL,
     "alone the rails give 97.0 and 97.0"),
    (lambda: measured(None), Level.UNKNOWN, r"29\.0 Gb/s over both rails \(14\.0 \+ 15\.0\) by TCP.*not installed"),
    (lambda: measured(None, (0.45, 0.5)), Level.FAIL, "1 Gb/s management network"),
    (lambda: measured(None, (14.0, 0.09)), Level.FAIL, rf"rail 1 \({SECOND}\) carries 0\.09 Gb/s"),
    (lambda: measured(None, (4.6, 4.8)), Level.UNKNOWN, "not installed"),  # the counters show that it was the link
]  # fmt: skip


@pytest.mark.parametrize(("make", "level", "says"), BANDWIDTHS)
def test_a_slow_link_is_told_from_a_broken_one(make: Callable[[], Any], level: Level, says: str) -> None:
    findings: list[Finding] = of(examined(measurement=make()), "bandwidth")
    assert {finding.level for finding in findings} == {level}, findings
    assert any(re.search(says, finding.evidence) for finding in findings), findings


def test_the_bar_is_the_inventorys() -> None:
    assert judged("bandwidth", measurement=measured((49.0, 49.0)), inventory=inventory(min_gbps=90.0))[0][0] is Level.OK


def test_streams_that_came_in_by_the_management_network_are_told() -> None:
    taken = measured(None, (4.6, 4.8))
    astray = tuple(
        replace(run, flows=tuple(replace(flow, arrived="enP7s7") for flow in run.flows)) for run in taken.runs
    )
    findings = bad(examined(measurement=replace(taken, runs=astray)))
    assert {one.check for one in findings} == {"route", "bandwidth"}
    assert f"came in by enP7s7 of spark-b, not by {FIRST}" in of(tuple(findings), "route")[0].evidence
    assert "10 Gb/s management network, by which it went" in of(tuple(findings), "bandwidth")[0].evidence


def test_one_slow_direction_is_told() -> None:
    both = measured(runs=runs("tcp", (14.0, 15.0)) + runs("rdma", (97.0, 97.0), (97.0, 66.0)))
    findings = bad(examined(measurement=both))
    assert [one.check for one in findings] == ["asymmetry"]
    assert "97.0 Gb/s from spark-a to spark-b, 66.0 back" in findings[0].evidence


def test_rdma_that_does_not_pass_fails_and_rdma_that_could_not_be_tried_does_not() -> None:
    for error, level in (("ib_write_bw hangs", Level.FAIL), ("Couldn't allocate MR", Level.UNKNOWN)):
        taken = measured()
        wrong = tuple(
            replace(run, flows=tuple(replace(flow, gbps=0.0, error=error) for flow in run.flows))
            if run.method == "rdma"
            else run
            for run in taken.runs
        )
        findings = of(examined(measurement=replace(taken, runs=wrong)), "bandwidth")
        assert error in findings[0].evidence
        assert findings[0].level is level
        assert findings[-1].level is Level.UNKNOWN  # what the streams say
        assert (replace(taken, runs=wrong).method, replace(taken, runs=wrong).gbps) == ("tcp", 29.0)


def test_a_dead_rail_is_named_by_path_and_bandwidth() -> None:
    taken = measured(None)
    silent = tuple(
        replace(ping, received=0, error="3 of 3 packets lost") if ping.rail == 1 else ping for ping in taken.pings
    )
    dead = tuple(
        replace(run, flows=tuple(replace(flow, gbps=0.0, received=0, error="No route to host") if flow.rail == 1 else flow
                                 for flow in run.flows))
        for run in taken.runs
    )  # fmt: skip
    findings = bad(examined(measurement=replace(taken, pings=silent, runs=dead)))
    assert {one.check for one in findings} == {"path", "bandwidth"}
    assert f"rail 1 ({SECOND}) carries nothing from spark-a: No route to host" in [one.evidence for one in findings]


def test_a_message_that_arrives_changed_is_told() -> None:
    taken = measured()
    changed = (replace(taken.messages[0], intact=False), *taken.messages[1:])
    (finding,) = bad(examined(measurement=replace(taken, messages=changed)))
    assert finding.evidence == f"rail 0 ({FIRST}): a message of 8 MiB from spark-a: it arrived changed"
