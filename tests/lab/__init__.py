"""Two simulated DGX Sparks: ``with Lab() as lab: lab.hosts[0].run(["nvidia-smi"])``. Needs root; see Lab.missing()."""

from .host import Counters, Host, PoweredOffError, Process
from .lab import Lab
from .processes.facts import Facts
from .waiting import eventually

__all__ = ["Counters", "Facts", "Host", "Lab", "PoweredOffError", "Process", "eventually"]
