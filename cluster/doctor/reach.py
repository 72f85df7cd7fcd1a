"""Whether the nodes are found, let each other in, and agree on the time. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.doctor.case import Case, Check, of_each
from cluster.facts import Facts, Unknown, known
from cluster.finding import Finding, Level

MOST_SKEW = 2.0  # seconds: certificates, file times and what is told in logs still fit together
_SET_CLOCK = "sudo timedatectl set-ntp true"


def _nodes(case: Case) -> Iterator[Finding]:
    for node, facts in zip(case.names, case.nodes, strict=True):
        if isinstance(facts, Unknown):
            yield Finding("node", Level.FAIL, node, facts.reason, f"is {node} on, and on this network?")
        else:
            release = known(facts.release, None)
            system = f"{release.name} {release.version}" if release else known(facts.os, None)
            name = system if isinstance(system, str) else system.name if system else "an unknown system"
            yield Finding("node", Level.OK, node, f"answered within {facts.duration:.2f} s: {name}")


def _ssh_folder(facts: Facts) -> Iterator[Finding]:
    mode, node = facts.ssh_folder, facts.node
    if isinstance(mode, Unknown):
        yield Finding("ssh folder", Level.UNKNOWN, node, f"~/.ssh: {mode.reason}")
    elif mode is None:
        evidence = "there is no ~/.ssh, so no key can be let in"
        yield Finding("ssh folder", Level.WARN, node, evidence, f"on {node}: mkdir -m 700 ~/.ssh")
    elif mode & 0o022:
        evidence = f"~/.ssh has mode {mode:o}: others may write there, so sshd lets no key in"
        yield Finding("ssh folder", Level.FAIL, node, evidence, f"on {node}: chmod 700 ~/.ssh")
    else:
        yield Finding("ssh folder", Level.OK, node, f"~/.ssh has mode {mode:o}")


def _names(case: Case) -> Iterator[Finding]:
    """Two boxes of one name, as two fresh ones may have: on mDNS one of them is renamed, and nobody knows which."""
    found = {facts.node: facts.hostname for facts in case.seen if isinstance(facts.hostname, str)}
    by_mdns = [node.host for node in case.inventory.nodes if node.host and node.host.lower().endswith(".local")]
    same = len(found) == 2 and len({name.lower() for name in found.values()}) == 1
    if same and not case.inventory.embedded:
        node, name = sorted(found.items())[1]
        evidence = f"both boxes are named {name}: on mDNS one of them becomes {name}-2"
        yield Finding("names", Level.WARN, None, evidence, f"on {node}: sudo hostnamectl set-hostname {node}")
    elif by_mdns:
        evidence = f"the inventory finds {' and '.join(by_mdns)} by mDNS, where names change hands"
        yield Finding(
            "names", Level.WARN, None, evidence, "write addresses for `host` in the inventory: `ip -4 addr` tells them"
        )
    elif len(found) < 2:
        missing = [node for node in case.names if node not in found]
        yield Finding("names", Level.UNKNOWN, None, f"the host name of {' and '.join(missing)} is not known")
    else:
        yield Finding("names", Level.OK, None, f"the boxes are named {' and '.join(found.values())}")


def _clocks(case: Case) -> Iterable[Finding]:
    if case.clocks is None:
        return [Finding("clock", Level.UNKNOWN, None, "the nodes' clocks were not compared")]
    head, peer = case.clocks
    skew, within = head.ahead - peer.ahead, head.within + peer.within
    ahead, behind = case.names if skew >= 0 else case.names[::-1]
    said = f"{ahead}'s clock is {abs(skew):.1f} s ahead of {behind}'s (within {within:.1f} s)"
    if abs(skew) - within > MOST_SKEW:
        return [Finding("clock", Level.FAIL, None, said, f"on both: {_SET_CLOCK}")]
    if abs(skew) + within > MOST_SKEW:
        return [Finding("clock", Level.UNKNOWN, None, f"{said}: the answers took too long to tell", "sparkctl doctor")]
    return [Finding("clock", Level.OK, None, said)]


def _time_server(facts: Facts) -> Iterator[Finding]:
    follows, node = facts.clock_synchronized, facts.node
    if isinstance(follows, Unknown) or follows is None:
        reason = follows.reason if follows else "`timedatectl` does not say"
        yield Finding("time server", Level.UNKNOWN, node, f"whether the clock follows a time server: {reason}")
    elif follows:
        yield Finding("time server", Level.OK, node, "the clock follows a time server")
    else:
        evidence = "the clock follows no time server, so it will run away"
        yield Finding("time server", Level.WARN, node, evidence, f"on {node}: {_SET_CLOCK}")


CHECKS = (
    Check(("node",), _nodes),
    of_each("ssh folder", _ssh_folder),
    Check(("names",), _names),
    Check(("clock",), _clocks),
    of_each("time server", _time_server),
)
