"""A measurement tells what each rail gives and by which way; it proves its token, ends in time, and leaves nothing behind."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from cluster import measure, measurement, stream
from cluster.doctor.bandwidth import judge
from cluster.errors import FailedError
from cluster.finding import Finding, Level
from cluster.inventory import Link
from cluster.link import End, LinkPlan, Rail
from cluster.measurement import Collective, Measurement, Ping, Wire
from cluster.transport import Result
from cluster.transport.hostkeys import KnownHosts
from cluster.transport.ssh import SshTransport
from tests.cluster.doctor.pair import measured
from tests.lab import Host, Lab, eventually

TOKEN, OTHER = b"t" * 32, b"o" * 32
HCAS = ("rocep1s0f0", "roceP2p1s0f0")
WIRE = Wire(("enp1s0f0np0", "enp1s0f1np1"), ("192.168.100.10", "192.168.100.11"), ("rocep1s0f0", "rocep1s0f1"), 9000)


# The helper, on loopback.


@pytest.fixture
def listener() -> Iterator[stream.Listener]:
    found = stream.Listener("127.0.0.1", TOKEN)
    yield found
    found.close()


def to(listener: stream.Listener) -> dict[str, Any]:
    return {"source": "127.0.0.1", "address": "127.0.0.1", "port": listener.port}


def test_streams_are_counted_alike_at_both_ends(listener: stream.Listener) -> None:
    (flow,) = stream.stream([to(listener)], TOKEN, 0.1, 3)
    assert flow.error == ""
    assert flow.sent == flow.received == listener.received > 1 << 20
    assert 0.05 < flow.seconds < 10


def test_who_does_not_know_the_token_is_refused(listener: stream.Listener) -> None:
    (flow,) = stream.stream([to(listener)], OTHER, 0.1, 2)
    assert (flow.sent, flow.received, flow.error) == (0, 0, "the listener does not accept the token")
    assert stream.message(**to(listener), token=OTHER, size=1000)["intact"] is False
    eventually(lambda: listener.refused == 3)
    assert listener.received == 0


def test_an_answer_cannot_be_used_twice_or_turned_round(listener: stream.Listener) -> None:
    with socket.create_connection(("127.0.0.1", listener.port)) as first:
        challenge = stream.exactly(first, 32)
        answer = b"b" * 32 + stream.proof(TOKEN, b"sender", challenge, b"b" * 32)
        first.sendall(answer)
        shown = stream.exactly(first, 32)
    assert shown == stream.proof(TOKEN, b"listener", challenge, b"b" * 32) != answer[32:]
    for said in (answer, b"b" * 32 + shown):
        with socket.create_connection(("127.0.0.1", listener.port)) as again:
            stream.exactly(again, 32)
            again.sendall(said)
            with pytest.raises(ConnectionResetError):
                stream.exactly(again, 32)


def test_a_listener_that_does_not_know_the_token_gets_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        heard: list[bytes] = []

        def pretend() -> None:
            connection, _ = impostor.accept()
            connection.sendall(b"n" * 32)
            stream.exactly(connection, 64)
            connection.sendall(b"p" * 32)
            heard.append(connection.recv(100))

        thread = threading.Thread(target=pretend)
        thread.start()
        flow = {"source": "127.0.0.1", "address": "127.0.0.1", "port": impostor.getsockname()[1]}
        (told,) = stream.stream([flow], TOKEN, 0.1, 1)
        thread.join(5)
    assert told.error == "the listener does not know the token"
    assert heard == [b""]


def test_who_says_nothing_keeps_nobody_out(listener: stream.Listener) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(socket.create_connection(("127.0.0.1", listener.port)))
        (flow,) = stream.stream([to(listener)], TOKEN, 0.05, 1)
    assert flow.error == ""


def test_a_listener_has_one_address_and_no_other(listener: stream.Listener) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", listener.port))
    with pytest.raises(ValueError, match="one address"):
        stream.Listener("0.0.0.0", TOKEN)  # noqa: S104 - refused
    bench = stream.Bench()
    assert bench.listen(["198.51.100.1"], TOKEN.hex()) == [{"port": 0, "error": "Cannot assign requested address"}]


def test_a_message_that_is_changed_on_the_way_is_not_intact(
    listener: stream.Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stream.message(**to(listener), token=TOKEN, size=3 << 20)["intact"] is True
    honest = hashlib.sha256
    monkeypatch.setattr(stream.hashlib, "sha256", lambda *data: honest(b"x", *data) if not data else honest(*data))
    assert stream.message(**to(listener), token=TOKEN, size=1000)["intact"] is False


def test_a_listener_that_goes_away_is_told_by_the_sender() -> None:
    found = stream.Listener("127.0.0.1", TOKEN)
    found.close()
    (flow,) = stream.stream([to(found)], TOKEN, 0.1, 1)
    assert (flow.received, flow.seconds, flow.error) == (0, 0.0, "Connection refused")


def test_the_helper_runs_on_any_python_from_3_8_and_needs_nothing_else() -> None:
    tree = ast.parse(Path(stream.__file__).read_text(), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not called & {"removeprefix", "removesuffix", "is_relative_to", "batched", "cache", "pairwise"}
    assert not [
        node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in ("shell", "strict", "slots")
    ]


def test_an_order_that_makes_no_sense_is_answered() -> None:
    for line in (b"not JSON", b'["rm", {}]', b'["listen", {}]', b"7"):
        assert list(stream.obeyed(stream.Bench(), line)) == ["failed"]


# What ping and ib_write_bw take and say.


def printed(text: str, status: int = 0, stderr: str = "") -> Result:
    return Result((), status, text.encode(), stderr.encode())


def test_a_full_size_ping_is_read() -> None:
    argv = measure.ping_argv("enp1s0f0np0", "192.168.100.11", 9000)
    assert argv[:2] == ["env", "LC_ALL=C"]
    assert shlex.join(argv[2:]) == "ping -n -M do -s 8972 -c 3 -i 0.2 -W 1 -I enp1s0f0np0 192.168.100.11"
    whole = (
        "8980 bytes from 192.168.100.11: icmp_seq=1\n3 packets transmitted, 3 received, 0% packet loss, time 408ms\n"
    )
    found = measure.read_ping(printed(whole + "rtt min/avg/max/mdev = 0.057/0.070/0.085/0.011 ms\n"), 0, 1, 9000)
    assert found == Ping(0, 1, 9000, 3, 3, 0.070)


@pytest.mark.parametrize(
    ("text", "stderr", "error"),
    [
        ("3 packets transmitted, 0 received, 100% packet loss, time 406ms\n", "", "3 of 3 packets lost"),
        ("3 packets transmitted, 0 received, +3 errors, 100% packet loss\n", "ping: local error: message too long, mtu=1500\n",
         "message too long, mtu=1500"),
        ("From 192.168.100.10 icmp_seq=1 Destination Host Unreachable\n3 packets transmitted, 0 received\n", "",
         "From 192.168.100.10 icmp_seq=1 Destination Host Unreachable"),
        ("", "ping: SO_BINDTODEVICE enp1s0f0np0: No such device\n", "ping: SO_BINDTODEVICE enp1s0f0np0: No such device"),
        ("3 packets transmitted, 2 received, 33% packet loss\n", "", "1 of 3 packets lost"),
    ],
)  # fmt: skip
def test_a_ping_that_is_lost_says_how(text: str, stderr: str, error: str) -> None:
    assert measure.read_ping(printed(text, 1, stderr), 0, 0, 9000).error == error


PERFTEST = """\
 WARNING: BW peak won't be measured in this run.
---------------------------------------------------------------------------------------
                    RDMA_Write BW Test
 Dual-port       : OFF\t\tDevice         : rocep1s0f0
 Mtu             : 4096[B]
 Link type       : Ethernet
 GID index       : 3
---------------------------------------------------------------------------------------
 local address: LID 0000 QPN 0x0108 PSN 0x63ad7d RKey 0x17eedf VAddr 0x007f760c947000
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 65536      353150           0.00               92.57  \t\t   0.176560
---------------------------------------------------------------------------------------
"""


def test_each_end_of_ib_write_bw_uses_its_own_device_address_and_gid() -> None:
    both = "-F --report_gbits --bind_source_ip"
    listening = measure.perftest_argv(WIRE, 1, port=18515, seconds=2.0, gid=5)
    assert shlex.join(listening).startswith("timeout --kill-after=1 8 ib_write_bw -d rocep1s0f1 -p 18515 -D 2 ")
    assert shlex.join(listening).endswith(f" -D 2 {both}=192.168.100.11 -x 5")
    sending = measure.perftest_argv(WIRE, 0, port=18515, seconds=0.2, gid=None, to="192.168.100.11")
    assert shlex.join(sending).endswith(f" -d rocep1s0f0 -p 18515 -D 1 {both}=192.168.100.10 192.168.100.11")


def test_the_table_of_ib_write_bw_is_read_in_gigabits_only() -> None:
    assert measure.read_perftest(PERFTEST) == 92.57
    assert measure.read_perftest(PERFTEST.replace("Gb/sec", "MB/sec")) is None
    assert measure.read_perftest(PERFTEST.replace("92.57", "nan")) is None
    assert measure.read_perftest("Couldn't allocate MR\n") is None


def test_ib_write_bw_without_a_table_is_quoted() -> None:
    said = "----\n Couldn't allocate MR\nfailed to create mr\n"
    assert measure.perftest_error(printed("", 1, said)) == "Couldn't allocate MR; failed to create mr"
    assert measure.perftest_error(printed("", 124)) == "ib_write_bw hangs"
    assert measure.perftest_error(printed("", 7)) == "ib_write_bw: exit status 7"


# The record.


def test_a_measurement_is_the_same_again_out_of_json() -> None:
    taken = measured().with_collective(Collective("gloo", 1 << 20, 1.5))
    assert measurement.from_json(taken.to_json()) == taken
    assert (taken.method, round(taken.gbps or 0, 2)) == ("rdma", 189.85)
    assert measured(None).method == "tcp"
    assert measured(runs=()).gbps is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"time": "now"}', measured().to_json().replace("9000", '"x"')])
def test_a_damaged_record_is_told(text: str) -> None:
    with pytest.raises(FailedError, match="the record of the last measurement is damaged"):
        measurement.from_json(text)


# On two hosts.


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if missing := Lab.missing():
        pytest.skip(missing)
    with Lab(init="simple") as found:
        for number, host in enumerate(found.hosts):
            for rail, interface in enumerate(host.rails):
                host.run(["ip", "addr", "add", f"192.168.10{rail}.{10 + number}/24", "dev", interface], "root")
                set_mtu(host, interface, 9000)
        yield found


@pytest.fixture(scope="module")
def transports(lab: Lab) -> Iterator[tuple[SshTransport, SshTransport]]:
    head, peer = (
        SshTransport(
            host.name,
            host.address,
            user="spark",
            identity_file=str(lab.identity_file),
            known_hosts=KnownHosts(lab.known_hosts),
        )
        for host in lab.hosts
    )
    with head, peer:
        yield head, peer


@pytest.fixture
def plan(lab: Lab) -> LinkPlan:
    first, second = (
        Rail(
            rail,
            IPv4Network(f"192.168.10{rail}.0/24"),
            *(
                End(host.name, host.rails[rail], IPv4Interface(f"192.168.10{rail}.{10 + number}/24"), HCAS[rail])
                for number, host in enumerate(lab.hosts)
            ),
            9000,
        )
        for rail in (0, 1)
    )
    return LinkPlan((first, second), adopted=True, findings=())


Measure = Callable[..., Measurement]


@pytest.fixture
def take(lab: Lab, plan: LinkPlan, transports: tuple[SshTransport, SshTransport]) -> Measure:
    def taken(*, rdma: bool = False, seconds: float = 0.2, nodes: Sequence[Any] = transports) -> Measurement:
        return measure.measure(plan, (nodes[0], nodes[1]), rdma=rdma, seconds=seconds, streams=2)

    return taken


def set_mtu(host: Host, interface: str, mtu: int) -> None:
    host.run(["ip", "link", "set", "dev", interface, "mtu", str(mtu)], "root")


def levels(taken: Measurement) -> dict[str, set[Level]]:
    found: dict[str, set[Level]] = {}
    for finding in judge(taken, Link()):
        found.setdefault(finding.check, set()).add(finding.level)
    return found


def findings(taken: Measurement, check: str) -> list[Finding]:
    return [finding for finding in judge(taken, Link()) if finding.check == check]


def helpers(host: Host) -> list[int]:
    return [process.pid for process in host.processes() if any("exec(compile(" in word for word in process.argv)]


def test_streams_prove_that_both_rails_carry_and_by_which_interfaces(lab: Lab, take: Measure) -> None:
    before = [host.counters("enP7s7") for host in lab.hosts]
    taken = take()
    assert [(run.method, run.sender, run.rails) for run in taken.runs] == [
        ("tcp", 0, (0, 1)), ("tcp", 1, (0, 1)), ("tcp", 0, (0,)), ("tcp", 0, (1,)),
    ]  # fmt: skip
    for run in taken.runs:
        for flow in run.flows:
            assert flow.sent == flow.received
            assert flow.arrived == lab.hosts[1 - run.sender].rails[flow.rail]
            assert flow.gbps > 0
    assert [(ping.sent, ping.received, ping.size) for ping in taken.pings] == [(3, 3, 9000)] * 4
    assert [(message.intact, message.size) for message in taken.messages] == [(True, 8 << 20)] * 4
    moved = sum(flow.received or 0 for run in taken.runs for flow in run.flows)
    for host, counted in zip(lab.hosts, before, strict=True):
        assert host.counters("enP7s7").received - counted.received < moved / 50
    wrong = {check: seen for check, seen in levels(taken).items() if seen - {Level.OK} and check != "asymmetry"}
    assert wrong == {"bandwidth": {Level.UNKNOWN}, "collective": {Level.UNKNOWN}}
    assert measurement.from_json(taken.to_json()) == taken
    for host in lab.hosts:
        eventually(lambda host=host: not helpers(host))


def test_a_slow_rail_is_named(lab: Lab, take: Measure) -> None:
    lab.slow(1, 100)
    try:
        taken = take()
    finally:
        lab.slow(1, None)
    for run in taken.runs:
        for flow in run.flows:
            assert (flow.gbps < 0.11) == (flow.rail == 1)
    (finding,) = findings(taken, "bandwidth")
    assert finding.level is Level.FAIL
    assert re.match(r"rail 1 \(enP2p1s0f0np0\) carries 0\.\d\d Gb/s by TCP", finding.evidence)


def test_an_mtu_that_differs_is_caught_by_the_pings_and_not_by_the_streams(lab: Lab, take: Measure) -> None:
    peer = lab.hosts[1]
    set_mtu(peer, peer.rails[1], 1500)
    try:
        taken = take()
    finally:
        set_mtu(peer, peer.rails[1], 9000)
    assert not any(flow.error for run in taken.runs for flow in run.flows)
    assert all(message.intact for message in taken.messages)
    assert levels(taken)["mtu"] == {Level.OK, Level.FAIL}
    told = [finding.evidence for finding in findings(taken, "mtu") if finding.level is Level.FAIL]
    assert len(told) == 2
    assert (
        "rail 1 (enP2p1s0f0np0): of packets of 9000 bytes from spark-a 0 of 3 come back, of small ones all" in told[0]
    )
    assert "message too long, mtu=1500" in told[1].replace(": mtu", ", mtu")
    assert levels(taken)["bandwidth"] == {Level.UNKNOWN}


def test_a_rail_without_a_cable_is_named_and_the_other_is_measured(lab: Lab, take: Measure) -> None:
    lab.cut(0)
    began = time.monotonic()
    try:
        taken = take()
    finally:
        lab.heal(0)
    assert time.monotonic() - began < 30
    assert all(bool(flow.error) == (flow.rail == 0) for run in taken.runs for flow in run.flows)
    assert {message.rail for message in taken.messages} == {1}
    assert levels(taken)["path"] == {Level.OK, Level.FAIL}
    assert all("rail 0 (enp1s0f0np0) carries nothing" in one.evidence for one in findings(taken, "bandwidth"))
    assert levels(taken)["bandwidth"] == {Level.FAIL}
    assert (taken.method, taken.gbps) == (None, None)


def test_ib_write_bw_is_judged_against_the_bar(lab: Lab, take: Measure) -> None:
    head, peer = lab.hosts
    head.facts(ib_write_bw={HCAS[0]: 92.57, HCAS[1]: 97.28})
    peer.facts(ib_write_bw={HCAS[0]: 92.0, HCAS[1]: 97.0})
    try:
        taken = take(rdma=True)
        rates = [[flow.gbps for flow in run.flows] for run in taken.runs if run.method == "rdma"]
        assert rates == [[92.57, 97.28], [92.0, 97.0], [92.57], [97.28]]
        assert (taken.method, taken.gbps) == ("rdma", 189.0)
        assert levels(taken)["bandwidth"] == levels(taken)["asymmetry"] == {Level.OK}
        head.facts(ib_write_bw={HCAS[0]: 13.1})  # and the other twin is not there for it
        taken = take(rdma=True)
        (failed,) = {flow.error for run in taken.runs for flow in run.flows if flow.error}
        assert "Unable to find the Infiniband/RoCE device" in failed
        assert levels(taken)["bandwidth"] == {Level.UNKNOWN}
    finally:
        for host in lab.hosts:
            host.facts(ib_write_bw={})


def test_ib_write_bw_that_is_not_there_costs_only_itself(take: Measure) -> None:
    taken = take(rdma=True)
    assert {flow.gbps for run in taken.runs if run.method == "rdma" for flow in run.flows} == {0.0}
    assert taken.method == "tcp"
    assert levels(taken)["bandwidth"] == {Level.UNKNOWN}


def test_an_address_that_is_not_there_is_told(lab: Lab, take: Measure) -> None:
    peer = lab.hosts[1]
    address = ["192.168.101.11/24", "dev", peer.rails[1]]
    peer.run(["ip", "addr", "del", *address], "root")
    try:
        taken = take()
    finally:
        peer.run(["ip", "addr", "add", *address], "root")
    errors = {flow.error for run in taken.runs for flow in run.flows if flow.rail == 1}
    assert "Cannot assign requested address" in errors
    assert levels(taken)["bandwidth"] == {Level.FAIL}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_helper_that_dies_ends_the_measurement_with_its_nodes_name(lab: Lab, take: Measure, victim: int) -> None:
    host = lab.hosts[victim]

    def kill() -> None:
        eventually(lambda: host.counters(host.rails[0]).received > already + (8 << 20), 20)
        for pid in helpers(host):
            os.kill(pid, signal.SIGKILL)

    already = host.counters(host.rails[0]).received
    killer = threading.Thread(target=kill)
    killer.start()
    began = time.monotonic()
    with pytest.raises(FailedError, match=host.name):
        take(seconds=3.0)
    killer.join()
    assert time.monotonic() - began < 25
    for each in lab.hosts:
        eventually(lambda each=each: not helpers(each))


class Recording:
    """A transport that notes every argv, and has no other way to a node than the one it is given."""

    def __init__(self, inner: SshTransport) -> None:
        self._inner = inner
        self.argvs: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in ("run", "session"):
            return found

        def noted(argv: Sequence[str], **rest: Any) -> Any:
            self.argvs += argv
            return found(argv, **rest)

        return noted


def test_the_token_stands_in_no_argv(
    take: Measure, transports: tuple[SshTransport, SshTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "5eed" * 16
    monkeypatch.setattr(measure.secrets, "token_hex", lambda size: token)
    nodes = [Recording(transport) for transport in transports]
    taken = take(nodes=nodes)
    assert not any(flow.error for run in taken.runs for flow in run.flows)
    assert all(node.argvs for node in nodes)
    assert not any(token in word for node in nodes for word in node.argvs)


class Liar:
    """A node whose helper answers whatever it likes."""

    def __init__(self, answer: bytes) -> None:
        self.name, self.python, self._answer = "spark-b", "python3", answer

    def run(self, argv: Sequence[str], **rest: Any) -> Result:
        return Result(tuple(argv), 0, b"", b"")

    def session(self, argv: Sequence[str]) -> Liar:
        return self

    def ask(self, order: bytes, *, timeout: float) -> bytes:
        return self._answer

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "answer",
    [b"", b"7", b"{}", b'{"done": null}', b'{"done": []}', b'{"done": [{"port": 1}]}', b'{"failed": "\\u001b[31m"}',
     b'{"done": [{"port": 1, "error": "", "received": 1, "sent": 1, "seconds": NaN}]}', b"[" * 5000],
)  # fmt: skip
def test_a_node_that_answers_nonsense_is_told_in_one_line(plan: LinkPlan, answer: bytes) -> None:
    with pytest.raises(FailedError) as error:
        measure.measure(plan, (Liar(answer), Liar(answer)), rdma=False, seconds=0.1)  # type: ignore[arg-type]
    assert "the link cannot be measured" in error.value.message
    assert error.value.message.isprintable()
