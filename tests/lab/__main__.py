"""A simulated pair to play with, until Ctrl-C or SIGTERM.

sudo .venv/bin/python -m tests.lab [--network networkd] [--bind FOLDER]... [--models FOLDER] [--memory GIB]
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from pathlib import Path

from .lab import Lab


def main() -> int:
    """Exit status 0, or 1 with one line on stderr when this machine cannot boot a pair."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab", description="Boot two simulated DGX Sparks until Ctrl-C."
    )
    parser.add_argument("--init", choices=("systemd", "simple"), default="systemd")
    parser.add_argument("--network", choices=("networkmanager", "networkd"), default="networkmanager")
    parser.add_argument(
        "--bind", action="append", default=[], type=Path, metavar="FOLDER", help="seen read-only on both"
    )
    parser.add_argument(
        "--models", type=Path, metavar="FOLDER", help="its subfolder of a host's name becomes /srv/models"
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="limit of each host")
    options = parser.parse_args()
    if missing := Lab.missing():
        print(missing, file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    memory = int(options.memory * 2**30) if options.memory else None
    lab = Lab(init=options.init, network=options.network, bind=options.bind, models=options.models, memory=memory)
    with contextlib.suppress(KeyboardInterrupt), lab:
        print(f"inventory  {lab.inventory_file}")
        for host in lab.hosts:
            print(f"{host.name:<10} ssh -F {lab.ssh_config} {host.name}")
        print(f"sparkctl   HOME={lab.home} sparkctl -i {lab.inventory_file} status")
        print("Ctrl-C ends the pair and leaves nothing.", flush=True)
        while True:
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
