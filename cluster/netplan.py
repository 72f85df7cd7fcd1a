"""The one netplan file that `up` writes, and the files that it must not fight with. Pure; netplan(5) is the format.

Netplan merges all of its files by name of definition, so another file that claims the same interface, under whatever name,
would be a second configuration of it: which one wins depends on the order of names, and on NetworkManager's mood.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster import yamlcore
from cluster.errors import RefusedError, WrongInputError
from cluster.facts import NETWORKD, NETWORKMANAGER, Facts, Nic, Unknown, known
from cluster.link import End

PATH = "/etc/netplan/40-cx7.yaml"  # NVIDIA's name for it (connect-two-sparks)
MODE = 0o600
Renderer = Literal["networkd", "NetworkManager"]


def render(ends: Sequence[End], *, renderer: Renderer, mtu: int) -> str:
    """The text of PATH for one node, in NVIDIA's form with the community's MTU.

    The renderer stands at each interface, so that no other interface changes hands. `optional`: a boot with the cable out
    must not wait two minutes for it (systemd-networkd-wait-online).
    """
    head = (
        "# Written by `sparkctl up`; `sparkctl down` puts back what was here.\nnetwork:\n  version: 2\n  ethernets:\n"
    )
    return head + "".join(
        f"    {end.interface}:\n"
        f"      renderer: {renderer}\n"
        f"      dhcp4: no\n"
        f"      dhcp6: no\n"
        f"      link-local: []\n"
        f"      mtu: {mtu}\n"
        f"      optional: true\n"
        f"      addresses: [{end.address}]\n"
        for end in ends
    )


def diff(old: str | None, new: str | None, path: str = PATH) -> str:
    """A unified diff of a file to show before it is written; None: no such file before, or after."""
    before, after = ((text or "").splitlines() for text in (old, new))
    first, second = (path if text is not None else "/dev/null" for text in (old, new))
    return "".join(f"{line}\n" for line in difflib.unified_diff(before, after, first, second, lineterm=""))


def renderer(facts: Facts, interfaces: Sequence[str]) -> Renderer:
    """Which of the node's two network services has the interfaces, or would get them.

    Who has them now counts first; for interfaces that nobody has, netplan's own `renderer:`, then which service runs.

    Raises:
        RefusedError: it cannot be told.
    """
    nics = [nic for name in interfaces if (nic := facts.nic(name))]
    having = {nic.manager for nic in nics if isinstance(nic.manager, str)}
    running = set(known(facts.managers, ()))
    for found in (having, _global_renderers(facts), running):
        if len(found) == 1:
            return NETWORKMANAGER if NETWORKMANAGER in found else NETWORKD
    reason = (
        facts.managers.reason if isinstance(facts.managers, Unknown) else f"running: {', '.join(running) or 'neither'}"
    )
    raise RefusedError(
        f"{facts.node}: whether NetworkManager or networkd has {' and '.join(interfaces)} cannot be told ({reason})",
        "start one of them: `sudo systemctl start NetworkManager`",
    )


def _global_renderers(facts: Facts) -> set[str]:
    """What netplan's files say for all interfaces: the last one counts. Empty where any of them cannot be read."""
    texts = [file.text for file in known(facts.netplan, ())]
    if any(isinstance(text, Unknown) for text in texts):
        return set()
    said = [_network(text).get("renderer") for text in texts if isinstance(text, str)]
    return {one for one in said if one in (NETWORKD, NETWORKMANAGER)} and {[one for one in said if one][-1]}


def unreadable(facts: Facts) -> tuple[str, ...]:
    """The netplan files that only root may read: read them with sudo, and give them to facts.with_netplan."""
    return tuple(file.path for file in known(facts.netplan, ()) if isinstance(file.text, Unknown))


@dataclass(frozen=True)
class Rival:
    """Another configuration of an interface: the file that holds it, and how to be rid of it."""

    interface: str
    source: str
    fix: str


def rivals(facts: Facts, interfaces: Sequence[str]) -> tuple[Rival, ...]:
    """Every lasting configuration of the interfaces, but for PATH: netplan's files, NetworkManager's and networkd's own."""
    nics = [nic for name in interfaces if (nic := facts.nic(name))]
    found = [
        Rival(nic.name, source, fix)
        for nic in nics
        for source, fix in (*_claiming_files(facts, nic), *_claiming_profiles(nic))
    ]
    return tuple(dict.fromkeys(found))


def refuse_rivals(facts: Facts, interfaces: Sequence[str]) -> None:
    """Let nothing be written beside another configuration of the same interface.

    Raises:
        RefusedError: there is one; both files are named.
    """
    for rival in rivals(facts, interfaces):
        raise RefusedError(
            f"{facts.node}: {rival.source} and {PATH} would both configure {rival.interface}",
            f"on {facts.node}: {rival.fix}",
        )


def _claiming_files(facts: Facts, nic: Nic) -> Iterator[tuple[str, str]]:
    for file in known(facts.netplan, ()):
        if file.path != PATH and isinstance(file.text, str) and _claims(file.text, nic):
            yield file.path, _fix(file.path, nic)


def _fix(path: str, nic: Nic) -> str:
    uuid = re.search(r"/90-NM-([0-9a-f-]{36})", path)
    if uuid:
        return f"sudo nmcli connection delete {uuid[1]}"
    return f"take {nic.name} out of {path}, or give both twins addresses there that last, which are then left alone"


def _claims(text: str, nic: Nic) -> bool:
    network = _network(text)
    if not network:  # of another shape, or broken by what the probe left out of it
        return re.search(rf"^[^#\n]*(?<![\w.-]){re.escape(nic.name)}(?![\w.-])", text, re.MULTILINE) is not None
    ethernets = network.get("ethernets")
    definitions = ethernets.items() if isinstance(ethernets, dict) else ()
    return any(_matches(name, definition, nic) for name, definition in definitions)


def _matches(name: str, definition: Any, nic: Nic) -> bool:
    match = definition.get("match") if isinstance(definition, dict) else None
    if not isinstance(match, dict) or not match:
        return name == nic.name
    return all(_fits(key, wanted, nic) for key, wanted in match.items())


def _fits(key: str, wanted: Any, nic: Nic) -> bool:
    if key == "name":
        return fnmatch.fnmatchcase(nic.name, str(wanted))
    if key == "macaddress":
        return str(wanted).lower() == nic.mac
    if key == "driver":
        return any(fnmatch.fnmatchcase(nic.driver or "", str(one)) for one in _listed(wanted))
    return True


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _network(text: str) -> dict[str, Any]:
    """The `network` mapping of a netplan file; empty where there is none."""
    try:
        data = yamlcore.load(text, str).data
    except WrongInputError:
        return {}
    found = data.get("network") if isinstance(data, dict) else None
    return found if isinstance(found, dict) else {}


def _claiming_profiles(nic: Nic) -> Iterator[tuple[str, str]]:
    generated = f"10-netplan-{nic.name}.network"
    for profile in known(nic.profiles, ()):
        name = profile.source.rpartition("/")[2]
        through_netplan = re.match(r"netplan-NM-([0-9a-f-]{36})", name)
        if through_netplan:  # NetworkManager keeps its profiles in netplan's folder since Ubuntu 23.10
            path = f"/etc/netplan/90-NM-{through_netplan[1]}.yaml"
            yield path, _fix(path, nic)
        elif profile.manager == NETWORKMANAGER and not name.startswith("netplan-"):
            yield profile.source, shlex.join(["sudo", "nmcli", "connection", "delete", profile.name])
        elif profile.manager == NETWORKD and not name.startswith("10-netplan-") and name < generated:
            # networkd takes the first file that matches, by name; what sorts after netplan's gives way to it.
            yield profile.source, f"rename {profile.source} so that it sorts after {generated}, or remove it"
