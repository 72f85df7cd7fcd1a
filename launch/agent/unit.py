"""The systemd unit that an agent runs in, if it does: enabled while the job goes on, so that a restarted node brings it back."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

# The unit's own name, which the unit file puts into the agent's environment.
VARIABLE = "SPARKCTL_UNIT"


@dataclass(frozen=True)
class Unit:
    """The instance of `sparkctl-job@.service`; without a name, this agent is in none."""

    name: str = ""

    @classmethod
    def ours(cls) -> Unit:
        """The one that this program runs in."""
        return cls(os.environ.get(VARIABLE, ""))

    def disable(self) -> None:
        """Do not start it at the next boot."""
        if self.name:
            subprocess.run(
                ["systemctl", "--user", "disable", "--quiet", self.name],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=20,
                check=False,
            )


def name_of(job: str) -> str:
    """The unit of a job."""
    return f"sparkctl-job@{job}.service"
