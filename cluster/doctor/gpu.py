"""The GPU: whether the driver answers, and whether the clock stays up under load. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.doctor.case import of_each
from cluster.facts import Facts, Unknown
from cluster.finding import Finding, Level
from cluster.readings.box import Gpu

BUSY = 90.0  # % of utilisation, from which on the clock tells something
STUCK = 850.0  # MHz: a GB10 that its power supply holds down runs at 500 to 850, of 3003
STARVED = 40.0  # W: and draws less than this
HOT = 0x20 | 0x40  # clock reasons of nvml.h: software and hardware thermal slowdown

_UNPLUG = "`sudo poweroff`, then unplug the power brick from the mains and the box for a minute"
_REINSTALL = "sudo apt update && sudo apt full-upgrade && sudo reboot"


def _driver(facts: Facts) -> Iterator[Finding]:
    gpus, module = facts.gpus, facts.nvidia_module
    if isinstance(gpus, Unknown):
        yield _no_answer(facts, gpus.reason)
    elif not gpus:
        yield Finding("driver", Level.FAIL, facts.node, "nvidia-smi shows no GPU", f"on {facts.node}: sudo reboot")
    elif isinstance(module, str) and gpus[0].driver and gpus[0].driver != module:
        evidence = f"nvidia-smi is of driver {gpus[0].driver}, the kernel runs {module}: an update is half done"
        yield Finding("driver", Level.FAIL, facts.node, evidence, f"on {facts.node}: sudo reboot")
    elif not facts.has_device("nvidiactl") and not isinstance(facts.devices, Unknown):
        evidence = f"{gpus[0].name} has no /dev/nvidiactl, so no program can use it"
        yield Finding("driver", Level.WARN, facts.node, evidence, f"on {facts.node}: sudo nvidia-modprobe -u -c 0")
    else:
        yield Finding("driver", Level.OK, facts.node, f"{gpus[0].name} answers, driver {gpus[0].driver}")


def _no_answer(facts: Facts, reason: str) -> Finding:
    if "exit status" not in reason:  # not installed, or it never returned
        return Finding("driver", Level.UNKNOWN, facts.node, reason, f"on {facts.node}: nvidia-smi")
    if "mismatch" in reason:
        return Finding(
            "driver", Level.FAIL, facts.node, f"{reason}: an update is half done", f"on {facts.node}: sudo reboot"
        )
    loaded = f"module {facts.nvidia_module}" if isinstance(facts.nvidia_module, str) else "no module nvidia"
    evidence = f"{reason} (kernel {facts.kernel if isinstance(facts.kernel, str) else 'unknown'} has {loaded})"
    return Finding("driver", Level.FAIL, facts.node, evidence, f"on {facts.node}: sudo reboot; else {_REINSTALL}")


def _clock(facts: Facts) -> Iterator[Finding]:
    if isinstance(facts.gpus, Unknown):
        yield Finding("gpu clock", Level.UNKNOWN, facts.node, f"the clock of the GPU: {facts.gpus.reason}")
        return
    for gpu in facts.gpus:
        yield judged(facts.node, gpu)


def judged(node: str, gpu: Gpu) -> Finding:
    """What the clock of a GPU tells, by how busy and how hot it is and what it draws."""
    if gpu.clock is None or gpu.utilization is None:
        return Finding("gpu clock", Level.UNKNOWN, node, f"{gpu.name} does not tell its clock and utilisation")
    drawn = "" if gpu.power is None else f", {gpu.power:.0f} W"
    said = f"{gpu.clock:.0f} MHz at {gpu.utilization:.0f} %{drawn}"
    if gpu.utilization < BUSY:
        return Finding("gpu clock", Level.UNKNOWN, node, f"{said}: only a busy GPU shows whether its clock stays up")
    if gpu.clock > STUCK:
        return Finding("gpu clock", Level.OK, node, said)
    if gpu.clock_reasons is not None and gpu.clock_reasons & HOT:
        evidence = f"{said}: slowed down by heat, {gpu.temperature or 0:.0f} degrees"
        return Finding("gpu clock", Level.WARN, node, evidence, "give the box air, and dust off its vents")
    if gpu.power is None or gpu.power < STARVED:
        level = Level.WARN if gpu.power is None or gpu.clock_reasons is None else Level.FAIL
        evidence = f"{said}, and not for heat: its power supply holds it down"
        return Finding("gpu clock", level, node, evidence, f"on {node}: {_UNPLUG}")
    return Finding("gpu clock", Level.WARN, node, f"{said}: low", f"on {node}: nvidia-smi -q -d PERFORMANCE")


CHECKS = (of_each("driver", _driver), of_each("gpu clock", _clock))
