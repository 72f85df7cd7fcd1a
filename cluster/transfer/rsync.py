"""How rsync is called where the copier's ports are closed: over SSH, with the key that this node has for the other. Pure."""

from __future__ import annotations

import shlex


def argv(other: str, source: str, target: str, home: str) -> list[str]:
    """Fetch the folder `source` of the node `other` (USER@ADDRESS) as `target`, on the node whose $SPARKCTL_HOME is `home`.

    Whole files (`-W`: the link is faster than comparing), in place so that an interruption loses nothing. `setpriv` has it die with
    the program that started it.
    """
    ssh = [
        *("ssh", "-F", "none", "-i", f"{home}/ssh/id_ed25519", "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"),
        *("-o", "StrictHostKeyChecking=yes", "-o", f"UserKnownHostsFile={home}/ssh/known_hosts"),
        *("-o", "ConnectTimeout=8", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
    ]
    how = ["rsync", "-rptW", "--inplace", "--protect-args", "-e", shlex.join(ssh)]
    return ["setpriv", "--pdeathsig", "TERM", *how, f"{other}:{source}/", f"{target}/"]
