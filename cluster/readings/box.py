"""What a box is and has: release, CUDA, GPU, memory, services."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass


def assignments(text: str) -> dict[str, str]:
    """`KEY=value` lines, quotes taken off, comments left out; where a key is given again, the last one counts."""
    found = re.findall(r"^\s*([A-Za-z_]\w*)=(.*?)\s*$", text, re.MULTILINE)
    return {key: value[1:-1] if value[:1] in ('"', "'") and value[-1:] == value[:1] else value for key, value in found}


def number(text: str | None) -> float | None:
    """The number that a text starts with (`11.17 W`, `0 %`); None for `[N/A]` and what has no number."""
    found = re.match(r"\s*(-?\d{1,15}(?:\.\d{1,9})?)(?![\d.])", text or "")
    return float(found[1]) if found else None


def whole(text: str | None) -> int | None:
    """The whole number that a text starts with."""
    value = number(text)
    return None if value is None else int(value)


@dataclass(frozen=True)
class DgxRelease:
    """/etc/dgx-release. Its OTA lines appear with an update and may repeat: the last are what the box runs."""

    name: str
    built: str  # DGX_SWBUILD_VERSION, what it was delivered with
    updated: str | None  # DGX_OTA_VERSION
    serial: str | None

    @property
    def version(self) -> str:
        """The version of DGX OS that the box runs."""
        return self.updated or self.built


def dgx_release(text: str) -> DgxRelease:
    """Read /etc/dgx-release."""
    found = assignments(text)
    name = found.get("DGX_PRETTY_NAME") or found.get("DGX_NAME", "")
    return DgxRelease(
        name, found.get("DGX_SWBUILD_VERSION", ""), found.get("DGX_OTA_VERSION"), found.get("DGX_SERIAL_NUMBER")
    )


@dataclass(frozen=True)
class OsRelease:
    """/etc/os-release: `id` ubuntu, `version` 24.04, `name` Ubuntu 24.04.3 LTS."""

    id: str
    version: str
    name: str


def os_release(text: str) -> OsRelease:
    """Read /etc/os-release."""
    found = assignments(text)
    return OsRelease(found.get("ID", ""), found.get("VERSION_ID", ""), found.get("PRETTY_NAME", ""))


def cuda_version(files: dict[str, str], nvcc: str | None) -> str | None:
    """The CUDA toolkit's version (`13.0.2`): of its version.json files the highest, else what `nvcc --version` says."""
    versions = [version for text in files.values() if (version := _toolkit(text))]
    if versions:
        return max(versions, key=lambda version: [int(part) for part in version.split(".")])
    found = re.search(r"\bV(\d{1,4}(?:\.\d{1,6}){1,2})\b", nvcc or "")
    return found[1] if found else None


def _toolkit(version_json: str) -> str | None:
    try:
        version = json.loads(version_json)["cuda"]["version"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) and re.fullmatch(r"\d{1,4}(\.\d{1,6}){1,3}", version) else None


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi shows it; None where it shows `[N/A]`, as a GB10 does for all of its memory."""

    name: str
    uuid: str | None
    driver: str | None
    memory: float | None  # MiB
    temperature: float | None  # degrees Celsius
    utilization: float | None  # %
    power: float | None  # W
    clock: float | None  # of the SMs, MHz
    max_clock: float | None  # MHz
    state: str | None  # P0 (busy) to P8 (idle)
    clock_reasons: int | None  # why the clock is low: bits as in nvml.h, 0x1 idle, 0x20 | 0x40 heat

    @property
    def is_gb10(self) -> bool:
        """Whether this is a DGX Spark's GPU, whoever built the box."""
        return "GB10" in self.name


def gpus(text: str) -> tuple[Gpu, ...]:
    """Read `nvidia-smi --query-gpu=... --format=csv` with its header line; the order of columns does not matter."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]  # nvidia-smi quotes nothing
    if not rows or "name" not in rows[0]:
        return ()
    header = [re.sub(r" \[.*\]$", "", name) for name in rows[0]]
    return tuple(_gpu(dict(zip(header, row, strict=True))) for row in rows[1:] if len(row) == len(header))


def _gpu(row: dict[str, str]) -> Gpu:
    words = {name: value for name, value in row.items() if value and not value.startswith("[")}
    reasons = words.get("clocks_event_reasons.active", "")
    return Gpu(
        name=words.get("name", ""),
        uuid=words.get("uuid"),
        driver=words.get("driver_version"),
        memory=number(words.get("memory.total")),
        temperature=number(words.get("temperature.gpu")),
        utilization=number(words.get("utilization.gpu")),
        power=number(words.get("power.draw")),
        clock=number(words.get("clocks.current.sm")),
        max_clock=number(words.get("clocks.max.sm")),
        state=words.get("pstate"),
        clock_reasons=int(reasons, 16) if re.fullmatch(r"0x[0-9a-fA-F]{1,16}", reasons) else None,
    )


@dataclass(frozen=True)
class GpuProcess:
    """A process that uses the GPU; `memory` in MiB."""

    pid: int
    name: str
    memory: float | None


def gpu_processes(text: str) -> tuple[GpuProcess, ...]:
    """Read `nvidia-smi --query-compute-apps=pid,used_memory,process_name --format=csv,noheader`; names may hold commas."""
    rows = (line.split(",", 2) for line in text.splitlines())
    return tuple(
        GpuProcess(int(row[0]), row[2].strip(), number(row[1]))
        for row in rows
        if len(row) == 3 and re.fullmatch(r"\s*\d{1,9}\s*", row[0])
    )


@dataclass(frozen=True)
class Memory:
    """/proc/meminfo, in bytes; `huge_*` of the huge pages, `cma` of the contiguous memory allocator (None: no such line).

    `free` is used for nothing at all, not even for the page cache.
    """

    total: int
    available: int
    swap_total: int
    swap_free: int
    huge_total: int
    huge_free: int
    cma: int | None
    free: int | None = None

    @property
    def cached(self) -> int:
        """What the kernel keeps of files and would give up: programs that ask CUDA what is free do not see it."""
        return max(0, self.available - self.free) if self.free is not None else 0

    @property
    def allocatable(self) -> int:
        """What a program can get, as facts/dgx-spark.md has it: free huge pages where there are any, else available and swap.

        NVML knows nothing of unified memory, and cudaMemGetInfo ignores the page cache, which can be dropped.
        """
        return self.huge_free if self.huge_total else self.available + self.swap_free


def memory(text: str) -> Memory | None:
    """Read /proc/meminfo; None where it lacks MemTotal or MemAvailable."""
    lines = re.findall(r"^(\w+):\s+(\d{1,15})(?: (kB))?\s*$", text, re.MULTILINE)
    found = {name: int(value) * (1024 if unit else 1) for name, value, unit in lines}
    if "MemTotal" not in found or "MemAvailable" not in found:
        return None
    page = found.get("Hugepagesize", 0)
    return Memory(
        total=found["MemTotal"],
        available=found["MemAvailable"],
        swap_total=found.get("SwapTotal", 0),
        swap_free=found.get("SwapFree", 0),
        huge_total=found.get("HugePages_Total", 0) * page,
        huge_free=found.get("HugePages_Free", 0) * page,
        cma=found.get("CmaTotal"),
        free=found.get("MemFree"),
    )


@dataclass(frozen=True)
class Unit:
    """A systemd unit: `load` loaded or not-found, `active` active or inactive, `enabled` enabled, disabled, masked or empty."""

    name: str
    load: str
    active: str
    enabled: str
    oom_score_adjust: int | None


def units(text: str) -> tuple[Unit, ...]:
    """Read `systemctl show --property=Id,LoadState,...`: blocks of assignments, a blank line between."""
    blocks = (assignments(block) for block in text.split("\n\n"))
    return tuple(
        Unit(
            name=found["Id"],
            load=found.get("LoadState", ""),
            active=found.get("ActiveState", ""),
            enabled=found.get("UnitFileState", ""),
            oom_score_adjust=whole(found.get("OOMScoreAdjust")),
        )
        for found in blocks
        if found.get("Id")
    )


def clock_synchronized(text: str) -> bool | None:
    """Read `timedatectl show`: whether the clock follows a time server; None where it does not say."""
    return {"yes": True, "no": False}.get(assignments(text).get("NTPSynchronized", ""))


def ufw_enabled(text: str) -> bool:
    """Read /etc/ufw/ufw.conf: whether Ubuntu's firewall starts with the box."""
    return assignments(text).get("ENABLED", "").lower() == "yes"


def version_numbers(text: str) -> tuple[int, ...] | None:
    """`2.28.3` or `2.9.0+cu130` as (2, 28, 3) or (2, 9, 0); None for what starts with no number."""
    found = re.match(r"\d{1,6}(\.\d{1,6}){0,3}", text)
    return tuple(int(part) for part in found[0].split(".")) if found else None


def nccl_library(names: tuple[str, ...]) -> str | None:
    """The version in the file names of the system's NCCL (`libnccl.so.2.28.3`): the highest."""
    found = (re.fullmatch(r"libnccl\.so\.(\d+\.\d+\.\d+)", name) for name in names)
    return max((name[1] for name in found if name), key=lambda version: version_numbers(version) or (), default=None)
