"""What an owner attaches to a report: facts, findings and logs of a pair, without what is private. Pure.

The same input gives the same bytes. Nodes are node-0 (the head) and node-1; other machines, users, MACs and public addresses get
placeholders that stay the same throughout (cluster.doctor.redaction).
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import Any

from cluster import yamlcore
from cluster.doctor.case import Log
from cluster.doctor.redaction import SECRET, Redactor
from cluster.errors import WrongInputError
from cluster.facts import Facts, NetplanFile, Unknown, known
from cluster.finding import Finding
from cluster.inventory import Inventory, is_secret
from cluster.measurement import Measurement
from cluster.readings.roce import PciAddress

MOST_LOG = 1 << 20  # bytes: the end of a log, where it tells what went wrong
FOLDER = "sparkctl-bundle"
_ABOUT = """\
A sparkctl doctor bundle. node-0 is the head, node-1 the peer.

inventory.json     the pair as it is configured
facts-node-N.json  what the probe saw of a node; {"unknown": why} where it could not look
findings.json      what the doctor made of it
measurement.json   the last measurement of the link, if there is one
logs/node-N/       the ends of logs

Left out: secrets, keys, serial numbers, MAC addresses, user and host names, addresses outside private ranges. The same thing has
the same placeholder everywhere. Look through it before you send it.
"""


def render(
    inventory: Inventory,
    nodes: Sequence[Facts],
    findings: Iterable[Finding],
    *,
    measurement: Measurement | None = None,
    logs: Iterable[Log] = (),
    secrets: Iterable[str] = (),
) -> bytes:
    """A tar.gz archive.

    Args:
        nodes: the facts of those nodes that could be looked at.
        secrets: values that must stand nowhere in it, beside those of the inventory's `env`: a token of the environment, say.
    """
    redactor = _redactor(inventory, nodes, secrets)
    rank = {node.name: number for number, node in enumerate(inventory.nodes)}
    files = {"README.txt": _ABOUT, "inventory.json": _json(redactor, _inventory(inventory))}
    for facts in nodes:
        files[f"facts-node-{rank.get(facts.node, 'unknown')}.json"] = _json(redactor, _facts(facts))
    files["findings.json"] = _json(redactor, list(findings))
    if measurement is not None:
        files["measurement.json"] = _json(redactor, measurement)
    for log in logs:
        name = re.sub(r"[^\w.-]+", "_", redactor.text(log.name)).strip("._") or "log"
        place = f"logs/node-{rank.get(log.node, 'unknown')}/{name}"
        files[_free(place, files)] = redactor.text(log.text[-MOST_LOG:])
    return _archive(files)


# Whom and what is to be known by name.


def _redactor(inventory: Inventory, nodes: Sequence[Facts], secrets: Iterable[str]) -> Redactor:
    own = [value for name, value in inventory.env.items() if is_secret(name)]
    names: dict[str, str] = {}
    for number, node in enumerate(inventory.nodes):
        names.setdefault(node.name, f"node-{number}")
    for kind, found in (
        ("host", _hosts(inventory, nodes)),
        ("user", _users(inventory, nodes)),
        ("id", _identities(nodes)),
    ):
        for count, name in enumerate((name for name in dict.fromkeys(found) if name not in names), 1):
            names[name] = f"{kind}-{count}"
    homes = [facts.user.home for facts in nodes if not isinstance(facts.user, Unknown)]
    return Redactor(secrets=[*own, *secrets], names=names, homes=homes)


def _hosts(inventory: Inventory, nodes: Sequence[Facts]) -> Iterator[str]:
    """Host names, with and without their domain, and the domain itself."""
    given = [node.host for node in inventory.nodes if node.host and not re.fullmatch(r"[\d.]+|.*:.*", node.host)]
    said = [facts.hostname for facts in nodes if isinstance(facts.hostname, str)]
    for name in (*given, *said, *(name for facts in nodes for name in _hosts_file(facts))):
        first, _, domain = name.partition(".")
        yield from (part for part in (name, first, domain if "." in domain else "") if part)  # `local` is a word too


def _hosts_file(facts: Facts) -> Iterator[str]:
    for line in (known(facts.hosts, None) or "").splitlines():
        words = line.partition("#")[0].split()
        yield from (word for word in words[1:] if not word.startswith("ip6-"))


def _users(inventory: Inventory, nodes: Sequence[Facts]) -> Iterator[str]:
    yield from (node.user for node in inventory.nodes if node.user)
    for facts in nodes:
        if not isinstance(facts.user, Unknown):
            yield from (name for name in (facts.user.name, facts.user.home.rstrip("/").rpartition("/")[2]) if name)
        yield from (
            listener.user for listener in known(facts.listeners, ()) if not listener.user.startswith("systemd-")
        )


def _identities(nodes: Sequence[Facts]) -> Iterator[str]:
    """What only one box in the world has."""
    for facts in nodes:
        release = known(facts.release, None)
        found = [release.serial if release else None, known(facts.machine_id, None), known(facts.boot_id, None)]
        found += [gpu.uuid for gpu in known(facts.gpus, ())]
        macs = [nic.mac for nic in known(facts.nics, ()) if nic.mac and nic.mac.strip("0:")]
        found += [mac.replace(":", "") for mac in macs]  # as they stand in names of interfaces
        yield from (one for one in found if one)


# What goes in.


def _inventory(inventory: Inventory) -> dict[str, Any]:
    found = inventory.model_dump(mode="json")
    found["env"] = {name: SECRET if is_secret(name) else value for name, value in inventory.env.items()}
    return found


def _facts(facts: Facts) -> Facts:
    """The facts without what people have written for themselves, and of netplan's files only what they say of Ethernet."""
    hosts, rules, netplan = facts.hosts, facts.nft, facts.netplan
    if isinstance(hosts, str):
        hosts = "\n".join(line.partition("#")[0].rstrip() for line in hosts.splitlines())
    if isinstance(rules, str):
        rules = re.sub(r'comment "[^"\n]*"', 'comment ""', rules)
    if not isinstance(netplan, Unknown):
        netplan = tuple(_ethernets(file) for file in netplan)
    return dataclasses.replace(facts, hosts=hosts, nft=rules, netplan=netplan)


def _ethernets(file: NetplanFile) -> NetplanFile:
    if isinstance(file.text, Unknown):
        return file
    try:
        data = yamlcore.load(file.text, str).data
    except WrongInputError:
        return dataclasses.replace(file, text=Unknown("left out: it is no YAML"))
    network = data.get("network") if isinstance(data, dict) else None
    if not isinstance(network, dict):
        return dataclasses.replace(file, text=Unknown("left out: it has no `network`"))
    kept = {name: network[name] for name in ("version", "renderer", "ethernets") if name in network}
    return dataclasses.replace(file, text=json.dumps(_without_owner(kept)))


def _without_owner(value: Any) -> Any:
    """Without what 802.1X logs in with, whatever else has a secret's name, and the names of the owner's domains."""
    if isinstance(value, dict):
        kept = {name: one for name, one in value.items() if name not in ("auth", "nameservers") and not is_secret(name)}
        return {name: _without_owner(one) for name, one in kept.items()}
    return [_without_owner(one) for one in value] if isinstance(value, list) else value


def _json(redactor: Redactor, value: Any) -> str:
    return json.dumps(_plain(redactor, value), indent=1, sort_keys=True) + "\n"


def _plain(redactor: Redactor, value: Any) -> Any:
    """As JSON has it, each text redacted."""
    if isinstance(value, Unknown):
        return {"unknown": redactor.text(value.reason)}
    if value is None or isinstance(value, bool | int | float):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, PciAddress | type):
        fields = [field.name for field in dataclasses.fields(value)]
        return {name: "(serial)" if name == "serial" else _plain(redactor, getattr(value, name)) for name in fields}
    if isinstance(value, dict):
        return {redactor.text(str(name)): _plain(redactor, one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(redactor, one) for one in value]
    return redactor.text(str(value.value if isinstance(value, Enum) else value))


# The archive.


def _free(place: str, taken: Iterable[str]) -> str:
    name, count = place, 1
    while name in taken:
        count += 1
        name = f"{place}.{count}"
    return name


def _archive(files: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, text in files.items():
            data = text.encode("utf-8", "replace")
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(packed.getvalue(), mtime=0)
