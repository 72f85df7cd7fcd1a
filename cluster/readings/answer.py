"""The probe's JSON, checked: nothing of a node's answer is used before its shape is known.

A node may be broken or hostile: its answer is limited in size, every value has its type, and no text can talk to a terminal.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import FailedError
from cluster.yamlcore import printable

MOST_BYTES = 4 << 20  # the probe sends at most 3 MiB
_BEGINNING = b'{"sparkctl_probe": '
T = TypeVar("T")


# Control characters but for tab and newline, and those that turn the direction of writing.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def _safe(value: str) -> str:
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value)


def _one_line(value: str) -> str:
    return printable(value.strip()[:300])


Text = Annotated[str, AfterValidator(_safe)]
Line = Annotated[str, AfterValidator(_one_line)]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False, defer_build=True)


class Value(_Strict, Generic[T]):
    """A fact: what was seen (None: it is not there), or why it could not be looked at."""

    value: T | None = None
    unknown: Line | None = None


class Cuda(_Strict):
    """See probe.cuda."""

    files: dict[Text, Text]
    nvcc: Text | None


class Cpu(_Strict):
    """See probe.cpu."""

    cores: Annotated[int, Field(ge=1, lt=100_000)]
    machine: Line


class Disk(_Strict):
    """See probe.disk."""

    device: int
    total: Count
    free: Count


class Nic(_Strict):
    """See probe.nic: as /sys has it."""

    flags: Line | None
    operstate: Line | None
    carrier: Line | None
    speed: Line | None
    mtu: Line | None
    address: Line | None
    driver: Line | None
    pci: Line | None


class Gid(_Strict):
    """A row of roce_port's `gids`."""

    index: Count
    gid: Line
    type: Line | None
    interface: Line | None


class RocePort(_Strict):
    """See probe.roce_port."""

    state: Line | None
    phys_state: Line | None
    rate: Line | None
    link_layer: Line | None
    gids: list[Gid]


class RoceDevice(_Strict):
    """See probe.roce_device."""

    fw_ver: Line | None
    hca_type: Line | None
    uevent: Text | None
    interfaces: list[Line]
    ports: dict[Line, RocePort]


class PcieLink(_Strict):
    """See probe.pcie."""

    current_link_speed: Line | None
    current_link_width: Line | None
    max_link_speed: Line | None
    max_link_width: Line | None


class NetworkManager(_Strict):
    """See probe.networkmanager."""

    devices: Text
    connections: Text
    profiles: Text


class NetworkdLink(_Strict):
    """See probe.networkd."""

    Name: Line
    AdministrativeState: Line | None = None
    NetworkFile: Line | None = None
    addresses: list[dict[Line, Any]]


class NetplanFile(_Strict):
    """See probe.netplan."""

    path: Line
    text: Value[Text]


class Listener(_Strict):
    """See probe.listeners."""

    address: Line
    user: Line
    pid: Count | None
    command: Line | None


class User(_Strict):
    """See probe.user."""

    uid: Count
    name: Line | None
    home: Text


class Packages(_Strict):
    """See probe.packages."""

    python: Text
    version: Line
    distributions: dict[Line, Line | None]


class Sparkctl(_Strict):
    """See probe.sparkctl."""

    path: Text
    mode: Count | None
    entries: list[Line]
    code: list[Line]
    jobs: list[Line]
    unit: Text | None


class Answers(_Strict):
    """Every fact of the probe, by its name there."""

    addresses: Value[Text]
    boot_id: Value[Line]
    cmdline: Value[Line]
    cpu: Value[Cpu]
    cuda: Value[Cuda]
    devices: Value[list[Line]]
    dgx_release: Value[Text]
    disks: Value[dict[Text, Value[Disk]]]
    dmesg: Value[Text]
    dmi: Value[dict[Line, Line | None]]
    earlyoom: Value[Text]
    ethtool: Value[dict[Line, Value[Text]]]
    gpu: Value[Text]
    gpu_processes: Value[Text]
    hostname: Value[Line]
    hosts: Value[Text]
    ibdev2netdev: Value[Text]
    ibstat: Value[Text]
    kernel: Value[Line]
    limits: Value[dict[Line, tuple[int, int]]]
    linger: Value[bool]
    listeners: Value[list[Listener]]
    lspci: Value[Text]
    machine_id: Value[Line]
    meminfo: Value[Text]
    nccl_libraries: Value[list[Line]]
    neighbours: Value[Text]
    netplan: Value[list[NetplanFile]]
    networkd: Value[list[NetworkdLink]]
    networkmanager: Value[NetworkManager]
    nft: Value[Text]
    nics: Value[dict[Line, Nic]]
    nvidia_module: Value[Line]
    os_release: Value[Text]
    packages: Value[Packages]
    pcie: Value[dict[Line, PcieLink]]
    python: Value[Line]
    roce: Value[dict[Line, RoceDevice]]
    routes: Value[Text]
    sparkctl: Value[Sparkctl]
    ssh_folder: Value[Count]
    sudo: Value[Line]
    swaps: Value[Text]
    timedatectl: Value[Text]
    tools: Value[dict[Line, Line | None]]
    ufw: Value[Text]
    units: Value[Text]
    uptime: Value[Text]
    user: Value[User]
    user_manager: Value[bool]


class Answer(_Strict):
    """What the probe printed. `time`: seconds since 1970 by the node's clock as it began; `duration` in seconds."""

    sparkctl_probe: int
    time: Annotated[float, Field(gt=0, lt=1e11)]
    duration: Annotated[float, Field(ge=0, lt=1e6)]
    facts: Answers


def read(raw: bytes, node: str) -> Answer:
    """Read the probe's output.

    Raises:
        FailedError: it is too large, holds no answer of the probe, or one of another shape.
    """
    fix = f"run `python3 -V` on {node}: it must be Python 3.8 or later, and nothing in the shell's start-up files may end it"
    if len(raw) > MOST_BYTES:
        raise FailedError(f"{node}: the probe's answer is larger than {MOST_BYTES >> 20} MiB", fix)
    lines = [line for line in raw.splitlines() if line.startswith(_BEGINNING)]
    if not lines:
        said = printable(raw[:80].decode("utf-8", "replace").strip()) or "nothing"
        raise FailedError(f"{node}: the probe did not answer; the node said: {said}", fix)
    try:
        return Answer.model_validate_json(lines[-1])
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = printable(".".join(str(part) for part in wrong["loc"])[:80])
        raise FailedError(f"{node}: the probe's answer is broken: {where}: {wrong['msg'][:120]}", fix) from None
