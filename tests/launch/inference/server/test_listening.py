"""A server that is started again listens where it did, if it may choose."""

from __future__ import annotations

from pathlib import Path

from launch.inference.endpoint import Endpoint
from launch.inference.server.run import listen, listen_again
from launch.job import JobFolder

HERE = "127.0.0.1"


def served_before(path: Path) -> tuple[JobFolder, int]:
    """A job's folder as an attempt leaves it that had any port that was free, and this port, free again."""
    with listen_again(HERE, 0, JobFolder(path)) as listener:
        port = listener.getsockname()[1]
    Endpoint(HERE, port, ("tiny",)).write(path)
    return JobFolder(path), port


def test_the_next_attempt_has_the_port_of_the_one_before(tmp_path: Path) -> None:
    folder, port = served_before(tmp_path)
    with listen_again(HERE, 0, folder) as listener:
        assert listener.getsockname() == (HERE, port)


def test_a_port_that_somebody_else_has_taken_since_is_left_to_them(tmp_path: Path) -> None:
    folder, port = served_before(tmp_path)
    with listen(HERE, port) as theirs:
        theirs.listen()
        with listen_again(HERE, 0, folder) as listener:
            assert listener.getsockname()[1] not in (0, port)
