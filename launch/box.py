"""What a node gives a rank: memory that is not spoken for, and how fast things are there, as far as anybody knows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.inventory import Node
from cluster.readings import box as readings
from cluster.readings.box import Memory

GIB = 2**30
# /proc/meminfo of a DGX Spark says 127600748 kB, or 125513944 kB before 2026: never 128 GB (facts of the boxes).
SPARK_MEMORY = 127600748 * 1024
# Kept back of every box for its operating system, and again as a guard before the kernel starts to swap or kill.
RESERVE = 6 * GIB
# A box so small that this would be most of it keeps back a sixteenth twice, which is less below 96 GiB.
SMALL = 16


@dataclass(frozen=True)
class Speeds:
    """What predictions are made of. Bandwidths are bytes/s; `flops` are of 16-bit matrix products, accumulated in 32 bits.

    `memory_share` and `flops_share` are how much of the specified value programs have reached, `layer` the seconds that it takes
    at least to start one layer's kernels one after the other. `sources` says of each where it is from.
    """

    memory: float
    memory_share: float
    flops: float
    flops_share: float
    link: float
    hop: float
    disk: float
    layer: float
    sources: tuple[str, ...]

    @property
    def read(self) -> float:
        """Bytes/s that programs read from memory."""
        return self.memory * self.memory_share

    @property
    def compute(self) -> float:
        """Floating-point operations/s that programs reach."""
        return self.flops * self.flops_share


SPARK = Speeds(
    memory=273e9,
    memory_share=0.78,
    flops=125e12,
    flops_share=0.27,
    link=21.875e9,
    hop=28e-6,
    disk=5.58e9,
    layer=1.07e-3,
    sources=(
        # NVIDIA's specification; Llama-3.3-70B in FP8 on one box: 332.7 ms a token, 212 GB/s.
        "memory: 273 GB/s by specification, 78% of it reached (published: 70B FP8, 332.7 ms a token)",
        # 1 PFLOP/s in sparse FP4 is 125 TFLOP/s in dense BF16. github.com/karpathy/autoresearch, pull request 207.
        "compute: 125 TFLOP/s in BF16 by specification, 27% of it reached (published: one box, training)",
        # NVIDIA's pass bar for NCCL over both rails; NCCL all_reduce of 8 KiB.
        "link: 21.9 GB/s, 28 us a message (NVIDIA's bar for NCCL over both rails)",
        # github.com/JustVugg/colibri, issue 136: 5.58 GB/s on one box; NVIDIA's own SSD read 10.74 GB/s.
        "disk: 5.6 GB/s (the slower of two SSDs that were measured)",
        # gpt-oss-120b without CUDA graphs: 26 tokens/s through 36 layers (conselara.dev/notes/dgx-spark-benchmarks).
        "kernels: at least 1.07 ms a layer, without CUDA graphs (published: gpt-oss-120b, 26 tokens/s)",
    ),
)


@dataclass(frozen=True)
class Box:
    """What one rank has of its node. `total` and `available` (None: unknown) are bytes of the whole node.

    `ranks` share it evenly. `speeds` are None where nothing is known of them. `about` says where the numbers are from.
    """

    node: str
    total: int
    available: int | None
    cuda: bool
    speeds: Speeds | None
    about: str
    ranks: int = 1

    @property
    def reserve(self) -> int:
        """Bytes kept back for the operating system, and as many again as a guard."""
        return min(RESERVE, self.total // SMALL)

    @property
    def usable(self) -> int:
        """Bytes that this rank may take: MemTotal less what the system and the guard keep, and no more than is free now."""
        most = self.total - 2 * self.reserve
        if self.available is not None:  # what the system takes is taken already
            most = min(most, self.available - self.reserve)
        return max(0, most // self.ranks)

    @property
    def is_busy(self) -> bool:
        """Whether it is what runs there now that limits it, not its size."""
        return self.available is not None and self.available - self.reserve < self.total - 2 * self.reserve


def asked(nodes: Sequence[Node], gib: float) -> tuple[Box, ...]:
    """Boxes of `gib` GiB each, otherwise like a DGX Spark."""
    return tuple(Box(node.name, int(gib * GIB), None, True, SPARK, f"a box of {gib:g} GiB, as asked") for node in nodes)


def of(
    nodes: Sequence[Node],
    memories: Mapping[str, Memory],
    *,
    gpus: Mapping[str, bool] | None = None,
    embedded: bool = False,
    has_gpu: bool = False,
) -> tuple[Box, ...]:
    """The boxes of the nodes that a recipe runs on.

    Args:
        memories: by node's name, what is known of them; a node that is not there is taken for a DGX Spark.
        gpus: whether a node has a GPU, as far as it told; others are Sparks, and have one.
        embedded: whether the pair is this machine alone, of whose speeds nothing is known.
        has_gpu: whether this machine has one; two ranks on one machine do without.
    """
    here = [node for node in nodes if node.is_local]
    made = []
    for node in nodes:
        memory = memories.get(node.name)
        made.append(
            Box(
                node.name,
                total=SPARK_MEMORY if memory is None else memory.total,
                available=None if memory is None else memory.available,
                cuda=(gpus or {}).get(node.name, True) if not embedded else has_gpu and len(nodes) == 1,
                speeds=None if embedded else SPARK,
                about="this machine" if embedded else "a DGX Spark" if memory is None else "as the node says",
                ranks=len(here) if node.is_local else 1,
            )
        )
    return tuple(made)


def this_memory() -> Memory | None:
    """This machine's memory; None where it cannot be told."""
    try:
        return readings.memory(Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:  # not Linux
        pass
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    # What is free is not told here.
    return Memory(total=total, available=total, swap_total=0, swap_free=0, huge_total=0, huge_free=0, cma=None)


def this_has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU with its driver."""
    return Path("/proc/driver/nvidia/version").exists()
