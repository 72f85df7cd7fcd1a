"""What a measurement says of the link: the known ways in which one is slow, told apart by their figures. Pure.

The figures are those of facts from NVIDIA's playbooks and from owners: 92.6 + 97.3 Gb/s over both rails, 98 to 112 over one; about
13 Gb/s with a badly initialised ConnectX-7; 98 Gb/s where one twin does all; 1 or 10 Gb/s over the management network.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.finding import Finding, Level
from cluster.inventory import Link
from cluster.measurement import SMALL, Flow, Measurement, Method, Ping, Run

GIGABIT = 1.1  # Gb/s: what a network of 1 Gb/s can give at most, and some
TEN_GIGABIT = (8.5, 10.5)  # Gb/s: what one of 10 Gb/s gives
BAD_START = (10.5, 20.0)  # Gb/s of one rail: a ConnectX-7 that has not initialised well; 13 was seen
ONE_TWIN = (85.0, 115.0)  # Gb/s of both rails: one PCIe link of 100 Gb/s does the work of two
UNEVEN = 0.75  # of the other rail or direction: less is no noise of RDMA
UNEVEN_TCP = 0.33  # nor of TCP, which varies with whatever else the cores do
NCCL_SLOW = 6.0  # GB/s: about 3 was seen where RDMA itself was fine
NCCL_SHARE = 0.65  # of the RDMA throughput that a healthy NCCL reaches at least; 0.8 to 0.95 were seen
MOST_OF = 0.9  # of a collective's bytes must show in the rails' counters; headers come on top

_COLD = "on both: `sudo poweroff`, then unplug the mains for a minute; then `sparkctl up`"
_MEASURE = "sparkctl bench link"


def judge(measurement: Measurement, link: Link) -> tuple[Finding, ...]:
    """Findings of the checks path, mtu, route, message, bandwidth, asymmetry and collective, of each at least one.

    Args:
        link: of the inventory; its `min_gbps` is the bar for both rails at once. Only RDMA can pass or miss it: streams of TCP
            prove the path, and fail near the speed of a management network alone.
    """
    return (
        *_packets(measurement),
        *_route(measurement),
        *_messages(measurement),
        *_bandwidth(measurement, link),
        *_asymmetry(measurement),
        *_collective(measurement, link),
    )


def rail_name(measurement: Measurement, rail: int) -> str:
    """`rail 0 (enp1s0f0np0)`, with both names where they differ."""
    names = dict.fromkeys(measurement.wires[rail].interfaces)
    return f"rail {rail} ({' to '.join(names)})"


# Packets.


def _packets(measurement: Measurement) -> Iterator[Finding]:
    for rail, wire in enumerate(measurement.wires):
        whole = [ping for ping in measurement.pings if ping.rail == rail and ping.size == wire.mtu]
        troubles = [finding for ping in whole if ping.received < ping.sent or not ping.sent
                    for finding in _lost(measurement, ping)]  # fmt: skip
        yield from troubles
        if not whole:
            yield Finding(
                "path", Level.UNKNOWN, None, f"{rail_name(measurement, rail)}: no packets were sent", _MEASURE
            )
        elif not troubles:
            slowest = max(ping.milliseconds or 0.0 for ping in whole)
            evidence = f"{rail_name(measurement, rail)}: packets of {wire.mtu} bytes pass whole both ways, within {slowest:.2f} ms"
            yield Finding("mtu", Level.OK, None, evidence)
            yield Finding("path", Level.OK, None, f"{rail_name(measurement, rail)}: every packet is answered")


def _lost(measurement: Measurement, ping: Ping) -> Iterator[Finding]:
    """Why packets of full size did not come back."""
    sender, receiver = measurement.nodes[ping.sender], measurement.nodes[1 - ping.sender]
    where = f"{rail_name(measurement, ping.rail)}: of packets of {ping.size} bytes from {sender}"
    counts = f"{ping.received} of {ping.sent} come back"
    if not ping.sent:
        evidence = f"{rail_name(measurement, ping.rail)}: ping cannot run on {sender}: {ping.error}"
        yield Finding("path", Level.UNKNOWN, sender, evidence, f"on {sender}: `sudo apt install iputils-ping`")
    elif ping.received:
        yield Finding("path", Level.WARN, sender, f"{where} only {counts}", "reseat the cable at both ends")
    elif _passes_small(measurement, ping):
        evidence = f"{where} {counts}, of small ones all: the MTU differs at its ends ({ping.error})"
        fix = f"`sparkctl up` sets {ping.size} on {sender} and {receiver}"
        yield Finding("mtu", Level.FAIL, sender, evidence, fix)
    elif any(flow.received for flow in _flows(measurement, "tcp", ping.rail)):
        evidence = f"{where} none comes back, though streams pass: something drops echo requests"
        yield Finding("mtu", Level.UNKNOWN, sender, evidence, f"on {receiver}: `sudo ufw status verbose`")
    else:
        evidence = f"{where} {counts}, nor do small ones: {ping.error}"
        fix = f"on {sender}: `ip addr show {measurement.wires[ping.rail].interfaces[ping.sender]}`; then `sparkctl up`"
        yield Finding("path", Level.FAIL, sender, evidence, fix)


def _passes_small(measurement: Measurement, full: Ping) -> bool:
    return any(
        ping.received and ping.size == SMALL and (ping.rail, ping.sender) == (full.rail, full.sender)
        for ping in measurement.pings
    )


def _flows(measurement: Measurement, method: Method, rail: int) -> list[Flow]:
    return [flow for run in measurement.runs if run.method == method for flow in run.flows if flow.rail == rail]


# Which way it went.


def _route(measurement: Measurement) -> Iterator[Finding]:
    moved, astray = 0, []
    for run in measurement.runs:
        for flow in run.flows:
            if run.method == "tcp" and flow.received:
                moved += flow.received
                expected = measurement.wires[flow.rail].interfaces[1 - run.sender]
                if flow.arrived != expected:
                    astray.append((run, flow, expected))
    for run, flow, expected in astray[:1]:
        receiver, sender = measurement.nodes[1 - run.sender], measurement.nodes[run.sender]
        address = measurement.wires[flow.rail].addresses[1 - run.sender]
        evidence = f"{flow.gbps:.1f} Gb/s from {sender} to {address} came in by {flow.arrived} of {receiver}, not by {expected}"
        yield Finding(
            "route", Level.FAIL, sender, evidence, f"`sparkctl up`; then on {sender}: `ip route get {address}`"
        )
    if moved and not astray:
        evidence = f"all {moved / 1e9:.1f} GB of the streams came in by the rails' own interfaces, as the kernel counts"
        yield Finding("route", Level.OK, None, evidence)
    elif not moved:
        yield Finding("route", Level.UNKNOWN, None, "no streams have passed, so their way is not known", _MEASURE)


def _messages(measurement: Measurement) -> Iterator[Finding]:
    bad = [message for message in measurement.messages if not message.intact]
    for message in bad:
        node = measurement.nodes[message.sender]
        what = message.error or "it arrived changed"
        evidence = f"{rail_name(measurement, message.rail)}: a message of {message.size >> 20} MiB from {node}: {what}"
        yield Finding("message", Level.FAIL, node, evidence, "reseat the cable at both ends, then `sparkctl up`")
    if measurement.messages and not bad:
        slowest = max(message.seconds for message in measurement.messages)
        size = measurement.messages[0].size >> 20
        evidence = f"messages of {size} MiB arrive as they left on each rail, both ways, within {slowest:.3f} s"
        yield Finding("message", Level.OK, None, evidence)
    elif not measurement.messages:
        yield Finding("message", Level.UNKNOWN, None, "no large message was sent", _MEASURE)


# How fast.


def _bandwidth(measurement: Measurement, link: Link) -> Iterator[Finding]:
    runs = measurement.both("rdma")
    if runs and measurement.method == "rdma":
        yield _against_the_bar(measurement, min(runs, key=lambda run: run.gbps), link)
        return
    for run in runs:
        yield from (_no_rdma(measurement, run, flow) for flow in run.flows if flow.error)
    yield from _by_streams(measurement, link, tried=bool(runs))


def _against_the_bar(measurement: Measurement, run: Run, link: Link) -> Finding:
    sender, receiver = measurement.nodes[run.sender], measurement.nodes[1 - run.sender]
    parts = " + ".join(f"{flow.gbps:.1f}" for flow in run.flows)
    said = f"{run.gbps:.1f} Gb/s over both rails ({parts}) from {sender} to {receiver}, by RDMA"
    if run.gbps >= link.min_gbps:
        return Finding("bandwidth", Level.OK, None, f"{said}; the bar is {link.min_gbps:g}")
    cause, fix = _cause(measurement, run)
    return Finding("bandwidth", Level.FAIL, None, f"{said}, below the bar of {link.min_gbps:g}: {cause}", fix)


def _cause(measurement: Measurement, run: Run) -> tuple[str, str]:
    """The likely cause of a throughput that is too low, and the fix."""
    total, rates = run.gbps, [flow.gbps for flow in run.flows]
    hcas = [",".join(wire.hcas[rank] for wire in measurement.wires) for rank in (0, 1)]
    if total <= GIGABIT or TEN_GIGABIT[0] <= total <= TEN_GIGABIT[1]:
        speed = 1 if total <= GIGABIT else 10
        return (
            f"the speed of a {speed} Gb/s management network",
            "on both: `ibstat` must say Rate: 200; then `sparkctl up`",
        )
    if any(BAD_START[0] < rate <= BAD_START[1] for rate in rates):
        return "a ConnectX-7 that has not initialised well gives about 13", _COLD
    if ONE_TWIN[0] <= total <= ONE_TWIN[1]:
        idle = [flow.rail for flow in run.flows if flow.gbps < 0.1 * total]
        what = (
            f"{rail_name(measurement, idle[0])} carries next to nothing" if idle else "as much as one twin gives alone"
        )
        names = hcas[0] if hcas[0] == hcas[1] else f"{hcas[0]} and {hcas[1]}"
        return (
            f"{what}; both twins must work",
            f"on both: `ibdev2netdev` must show both Up; NCCL_IB_HCA must be {names}",
        )
    slow, fast = sorted(run.flows, key=lambda flow: flow.gbps)
    if slow.gbps < UNEVEN * fast.gbps:
        fix = "on both: `sudo lspci -vv -d 15b3: | grep LnkSta:` must say 32GT/s, Width x4 everywhere; else reseat the cable"
        return f"{rail_name(measurement, slow.rail)} is the slow one", fix
    alone = [one.gbps for one in measurement.alone("rdma") if not one.errors]
    if len(alone) == 2 and sum(alone) > total / UNEVEN:
        rest = " and ".join(f"{gbps:.1f}" for gbps in alone)
        return (
            f"alone the rails give {rest}, so they hold each other up",
            f"end what else uses the link, then `{_MEASURE}`",
        )
    return (
        "both rails are slow",
        "use a cable that NVIDIA names (Amphenol NJAAKK-N911, Luxshare LMTQF022-SD-R), no switch",
    )


_ON_THE_WIRE = ("hangs", "Completion with error", "Failed status", "retry")


def _no_rdma(measurement: Measurement, run: Run, flow: Flow) -> Finding:
    """ib_write_bw gave no figure. That RDMA does not pass is a failure; that it could not be tried is none."""
    node, hca = measurement.nodes[run.sender], measurement.wires[flow.rail].hcas[run.sender]
    evidence = f"{rail_name(measurement, flow.rail)}: ib_write_bw from {node}: {flow.error}"
    if any(word in flow.error for word in _ON_THE_WIRE):
        return Finding("bandwidth", Level.FAIL, node, evidence, f"on both: `show_gids`, `ip link`; then `{_MEASURE}`")
    return Finding("bandwidth", Level.UNKNOWN, node, evidence, f"on {node}: `ibstat {hca}`, `ulimit -l`")


def _by_streams(measurement: Measurement, link: Link, *, tried: bool) -> Iterator[Finding]:
    runs = measurement.both("tcp")
    if not runs:
        yield Finding("bandwidth", Level.UNKNOWN, None, "the link has not been measured", _MEASURE)
        return
    failed = [(run, flow) for run in runs for flow in run.flows if flow.error]
    slow = [rail for rail in (0, 1) if 0 < max(flow.gbps for flow in _flows(measurement, "tcp", rail)) <= GIGABIT]
    for run, flow in failed:
        node = measurement.nodes[run.sender]
        evidence = f"{rail_name(measurement, flow.rail)} carries nothing from {node}: {flow.error}"
        yield Finding("bandwidth", Level.FAIL, node, evidence, "on both: `ip addr`; then `sparkctl up`")
    for rail in slow:
        gbps = max(flow.gbps for flow in _flows(measurement, "tcp", rail))
        evidence = (
            f"{rail_name(measurement, rail)} carries {gbps:.2f} Gb/s by TCP: the speed of a 1 Gb/s management network"
        )
        yield Finding(
            "bandwidth", Level.FAIL, None, evidence, "on both: `ibstat` must say Rate: 200; then `sparkctl up`"
        )
    if failed or slow:
        return
    run = min(runs, key=lambda one: one.gbps)
    parts = " + ".join(f"{flow.gbps:.1f}" for flow in run.flows)
    said = f"{run.gbps:.1f} Gb/s over both rails ({parts}) by TCP"
    if TEN_GIGABIT[0] <= run.gbps <= TEN_GIGABIT[1] and not _on_the_rails(measurement, run):
        evidence = f"{said}: the speed of a 10 Gb/s management network, by which it went"
        yield Finding("bandwidth", Level.FAIL, None, evidence, "sparkctl up")
        return
    why = "ib_write_bw gave no figure" if tried else "ib_write_bw is not installed"
    evidence = f"{said} prove the path, not the bar of {link.min_gbps:g}: {why}"
    yield Finding(
        "bandwidth", Level.UNKNOWN, None, evidence, f"on both: `sudo apt install perftest`; then `{_MEASURE}`"
    )


def _on_the_rails(measurement: Measurement, run: Run) -> bool:
    return all(flow.arrived == measurement.wires[flow.rail].interfaces[1 - run.sender] for flow in run.flows)


def _asymmetry(measurement: Measurement) -> Iterator[Finding]:
    method = measurement.method
    runs = {run.sender: run for run in measurement.both(method)} if method else {}
    if not method or len(runs) < 2:
        yield Finding("asymmetry", Level.UNKNOWN, None, "the link has not been measured in both directions", _MEASURE)
        return
    there, back = runs[0], runs[1]
    uneven = UNEVEN if method == "rdma" else UNEVEN_TCP
    head, peer = measurement.nodes
    for rail in (0, 1):
        rates = [next(flow.gbps for flow in run.flows if flow.rail == rail) for run in (there, back)]
        if min(rates) < uneven * max(rates):
            rest = f"{rates[0]:.1f} Gb/s from {head} to {peer}, {rates[1]:.1f} back, by {method.upper()}"
            evidence = f"{rail_name(measurement, rail)}: {rest}"
            fix = "swap the ends of the cable: if the slow direction turns round with it, it is the cable"
            yield Finding("asymmetry", Level.WARN, None, evidence, fix)
            return
    evidence = f"{there.gbps:.1f} Gb/s from {head} to {peer}, {back.gbps:.1f} back, by {method.upper()}"
    yield Finding("asymmetry", Level.OK, None, evidence)


def _collective(measurement: Measurement, link: Link) -> Iterator[Finding]:
    found = measurement.collective
    if found is None:
        yield Finding("collective", Level.UNKNOWN, None, "no all-reduce between the nodes was timed", _MEASURE)
        return
    if found.error:
        evidence = f"two ranks cannot reduce a tensor together: {found.error}"
        yield Finding("collective", Level.FAIL, None, evidence, f"`sparkctl doctor`; then `{_MEASURE}`")
        return
    said = f"{found.backend} moves {found.bus:.1f} GB/s between the ranks"
    if found.carried is not None and found.carried < MOST_OF * found.moved:
        share = f"{found.carried / 1e6:.0f} of {found.moved / 1e6:.0f} MB"
        evidence = f"{said}, but the rails carried only {share}{f', and {found.astray} the rest' * bool(found.astray)}"
        fix = "`sparkctl status --env` must name the rails' interfaces; take what says otherwise out of the inventory's `env`"
        yield Finding("collective", Level.FAIL, None, evidence, fix)
        return
    said += ", all of it over the rails, as their counters show" * (found.carried is not None)
    if found.backend != "nccl":
        yield Finding("collective", Level.OK, None, said)
        return
    rdma = (measurement.gbps if measurement.method == "rdma" else None) or link.min_gbps
    if found.bus <= NCCL_SLOW < NCCL_SHARE * rdma / 8:
        fix = f"a release of NCCL, no development branch (`sparkctl up` installs one); else {_COLD}"
        evidence = f"{said}, though RDMA gives {rdma:.0f} Gb/s ({rdma / 8:.1f} GB/s)"
        yield Finding("collective", Level.FAIL, None, evidence, fix)
    elif found.bus < NCCL_SHARE * rdma / 8:
        hcas = ",".join(wire.hcas[0] for wire in measurement.wires)
        evidence = f"{said}, and should {NCCL_SHARE * rdma / 8:.1f}: one twin does the work of two"
        yield Finding("collective", Level.FAIL, None, evidence, f"NCCL_IB_HCA must name both twins: {hcas}")
    else:
        yield Finding("collective", Level.OK, None, said)
