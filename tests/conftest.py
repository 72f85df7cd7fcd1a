"""Settings that must stand before torch is first imported."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.laptop import Laptop

# One thread: ranks share two cores, and sums must be taken in one order for two ranks and one process to be compared to the bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts what runs in the background deaf to Ctrl-C, and programs inherit that: the tests' own must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """A laptop and its pair of two simulated Sparks after `sparkctl up`; see tests/laptop.py for how to leave it."""
    from tests.laptop import laptop_with_pair

    with laptop_with_pair(tmp_path_factory.mktemp("laptop")) as made:
        yield made
