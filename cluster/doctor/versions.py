"""The same versions on both boxes: what talks to its like must be its like. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.doctor.case import Case, Check, of_both
from cluster.facts import Facts, Unknown, known
from cluster.finding import Finding, Level
from cluster.readings.box import version_numbers

_SYSTEM = "sudo apt update && sudo apt full-upgrade && sudo reboot"
_FIRMWARE = "sudo fwupdmgr refresh && sudo fwupdmgr update && sudo reboot"

Version = str | Unknown | None


@dataclass(frozen=True)
class _Part:
    """Something whose version must be the same: how a node tells it, how bad a difference is, and how to update it."""

    name: str
    of: Callable[[Facts], Version]
    level: Level
    update: str | None  # a command for the node with the older one; None: `sparkctl up` installs it on both

    def compare(self, head: Facts, peer: Facts) -> Iterator[Finding]:
        versions = [(facts.node, self.of(facts)) for facts in (head, peer)]
        unknown = [f"{node}: {version.reason}" for node, version in versions if isinstance(version, Unknown)]
        told = [version for _, version in versions]
        if unknown:
            yield Finding(self.name, Level.UNKNOWN, None, f"the version of {self.name}: {'; '.join(unknown)}")
        elif told[0] == told[1] and told[0] is not None:
            yield Finding(self.name, Level.OK, None, f"{self.name} {told[0]} on both")
        elif told == [None, None]:
            fix = "sparkctl up" if self.update is None else ""
            yield Finding(self.name, Level.UNKNOWN, None, f"neither node says its version of {self.name}", fix)
        else:
            evidence = " and ".join(f"{version or 'none'} on {node}" for node, version in versions)
            yield Finding(self.name, self.level, None, f"{self.name}: {evidence}", self._fix(versions))

    def _fix(self, versions: list[tuple[str, Version]]) -> str:
        if self.update is None:
            return "sparkctl up"
        node, _ = min(versions, key=lambda one: version_numbers(one[1] if isinstance(one[1], str) else "") or ())
        return f"on {node}: {self.update}"


def _driver(facts: Facts) -> Version:
    gpus = known(facts.gpus, ())
    if gpus and gpus[0].driver:
        return gpus[0].driver
    if isinstance(facts.nvidia_module, str):
        return facts.nvidia_module
    return facts.gpus if isinstance(facts.gpus, Unknown) else facts.nvidia_module


def _firmware(facts: Facts) -> Version:
    """Of the ConnectX-7; all of its functions have the same."""
    if isinstance(facts.roce, Unknown):
        return facts.roce
    return ", ".join(sorted({device.firmware for device in facts.roce if device.firmware})) or None


def _nccl(facts: Facts) -> Version:
    if facts.nccl is None and isinstance(facts.packages, Unknown):
        return facts.packages
    return facts.nccl


def _distribution(name: str) -> Callable[[Facts], Version]:
    def of(facts: Facts) -> Version:
        packages = facts.packages
        return packages if packages is None or isinstance(packages, Unknown) else packages.version_of(name)

    return of


_PARTS = (
    _Part("driver version", _driver, Level.WARN, _SYSTEM),
    _Part("cuda", lambda facts: facts.cuda, Level.WARN, _SYSTEM),
    _Part("kernel", lambda facts: facts.kernel, Level.WARN, _SYSTEM),
    _Part("firmware", _firmware, Level.WARN, _FIRMWARE),
    _Part("nccl", _nccl, Level.FAIL, None),
    _Part("torch", _distribution("torch"), Level.FAIL, None),
    _Part("transformers", _distribution("transformers"), Level.FAIL, None),
)


def _code(case: Case) -> Iterator[Finding]:
    """Our own code, by the names of the folders that `up` ships it in: hashes of their content."""
    homes = {facts.node: facts.sparkctl for facts in case.seen}
    lacking = [node for node, home in homes.items() if not isinstance(home, Unknown) and case.code not in home.code]
    unknown = [f"{node}: {home.reason}" for node, home in homes.items() if isinstance(home, Unknown)]
    unknown += [f"{node} could not be looked at" for node in case.names if node not in homes]
    if lacking and not any(home.code for home in homes.values() if not isinstance(home, Unknown)):
        yield Finding("code", Level.UNKNOWN, None, "our code was shipped to neither node yet", "sparkctl up")
    elif lacking:
        evidence = f"our code {case.code} is not on {' and '.join(lacking)}"
        yield Finding("code", Level.WARN, None, evidence, "sparkctl up")
    elif unknown:
        yield Finding("code", Level.UNKNOWN, None, f"our code: {'; '.join(unknown)}")
    else:
        yield Finding("code", Level.OK, None, f"our code {case.code} is on both")


CHECKS = (*(of_both(part.name, part.compare) for part in _PARTS), Check(("code",), _code))
