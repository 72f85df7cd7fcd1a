"""One endpoint for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.inference.server.serving import Served, equip, serving


@pytest.fixture(scope="package")
def parrots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and its adapter."""
    return equip(tmp_path_factory.mktemp("parrots"))


@pytest.fixture(scope="package")
def endpoint(parrots: Path) -> Iterator[Served]:
    """It answers on two ranks."""
    with serving(parrots) as served:
        yield served
