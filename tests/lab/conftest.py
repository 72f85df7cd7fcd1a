"""Labs that the lab's own tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.lab import Lab


@pytest.fixture(scope="session", autouse=True)
def _possible() -> None:
    if missing := Lab.missing():
        # Root could mend it (`make test` does), so as root it is a fault; without root these tests are left out, and it is said.
        (pytest.skip if os.geteuid() else pytest.fail)(missing)


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two hosts as DGX OS has them, with everything that an option can add."""
    with Lab(memory=1 << 30, models=tmp_path_factory.mktemp("models"), bind=[sys.prefix]) as lab:
        yield lab


@pytest.fixture(scope="package")
def simple() -> Iterator[Lab]:
    """Two hosts without systemd, cabled crosswise, whose user lives in a folder with spaces in its name."""
    with Lab(init="simple", home="/home/spark of ours", cables=[(0, 1)], names=("head", "peer")) as lab:
        for number, host in enumerate(lab.hosts, 1):
            host.run(["ip", "addr", "add", f"10.0.0.{number}/24", "dev", host.rails[0]], "root")
        yield lab
