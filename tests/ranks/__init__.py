"""Two real ranks for tests: forked from a server that has torch loaded and never computes, joined over gloo."""

from tests.ranks.pair import run_ranks

__all__ = ["run_ranks"]
