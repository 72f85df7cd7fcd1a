"""PID 1 of a host without systemd: brings the network up, keeps sshd running, reaps orphans.

SIGUSR1 turns sshd off, SIGUSR2 on again; any other end of sshd starts it anew.
"""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NoReturn

SIGNALS = {signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2}


def main() -> NoReturn:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they wait until sigwait asks for them
    with Path("/usr/lib/sparklab/network").open() as commands:
        subprocess.run(["ip", "-batch", "-"], stdin=commands, check=True)
    Path("/run/sshd").mkdir()
    wanted, sshd = True, start()
    while True:
        asked = signal.sigwait(SIGNALS)
        if asked == signal.SIGCHLD:
            if sshd in reap():
                sshd = 0
                time.sleep(0.05)  # one that cannot start must not spin
        else:
            wanted = asked == signal.SIGUSR2
            if sshd and not wanted:
                os.kill(sshd, signal.SIGTERM)
        if wanted and not sshd:
            sshd = start()


def start() -> int:
    """The pid of a new sshd."""
    return os.fork() or become_sshd()


def become_sshd() -> NoReturn:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    log = os.open("/var/log/sshd.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.execv("/usr/sbin/sshd", ["/usr/sbin/sshd", "-D", "-e"])  # noqa: S606 - without a shell, as it should be


def reap() -> set[int]:
    """The pids of the children that have ended, orphans included."""
    ended = set()
    try:
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            ended.add(pid)
    except ChildProcessError:
        pass
    return ended


if __name__ == "__main__":
    main()
