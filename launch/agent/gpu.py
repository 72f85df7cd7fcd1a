"""The GPU of a node while its ranks run: whether its clock stays up, and whether it gets too hot."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence

from cluster import probe
from cluster.doctor.gpu import BUSY, HOT, judged
from cluster.finding import Level
from cluster.readings import box as readings
from cluster.readings.box import Gpu

# Seconds between two looks; and so many in a row must agree, for a moment between two steps looks like a low clock.
EVERY = 20.0
AGREE = 3


def trouble(node: str, gpus: Sequence[Gpu]) -> str:
    """What is wrong with them, in words with what to do; empty: nothing is, or only a busy GPU would show it. Pure."""
    for gpu in gpus:
        if gpu.clock_reasons is not None and gpu.clock_reasons & HOT and (gpu.utilization or 0.0) >= BUSY:
            warm = "" if gpu.temperature is None else f", {gpu.temperature:.0f} degrees"
            clock = "" if gpu.clock is None else f" to {gpu.clock:.0f} MHz"
            return (
                f"node {node}: {gpu.name} is slowed down{clock} by heat{warm}; give the box air, and dust off its vents"
            )
        finding = judged(node, gpu)
        if finding.level in (Level.WARN, Level.FAIL):
            return f"node {node}: {gpu.name} runs at {finding.evidence}; {finding.fix}"
    return ""


class Steady:
    """The trouble that several looks in a row agree on. Its words change with every look; what counts is that there is some."""

    def __init__(self) -> None:
        self._count = 0
        self.warning = ""

    def look(self, found: str) -> None:
        """Take what a look has found."""
        self._count = self._count + 1 if found else 0
        if not found:
            self.warning = ""
        elif self._count == AGREE:
            self.warning = found


class GpuWatch:
    """Looks again and again, in a thread of its own: nvidia-smi on a wedged driver never returns. Without a GPU it does nothing."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._steady = Steady()
        if shutil.which("nvidia-smi") is not None:
            threading.Thread(target=self._look, daemon=True).start()

    @property
    def warning(self) -> str:
        """What has been wrong for a while; empty: nothing."""
        return self._steady.warning

    def _look(self) -> None:
        pause = threading.Event()
        while not pause.wait(EVERY):
            try:
                table = probe.gpu()
            except probe.CannotLookError:
                continue  # unknown is no trouble, and takes none back
            self._steady.look(trouble(self._node, readings.gpus(table)))
