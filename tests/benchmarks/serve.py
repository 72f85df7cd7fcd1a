"""Serving: what two stages give, beside what the machine could give, in one run of about six minutes.

    .venv/bin/python -m tests.benchmarks.serve            # or: decode sleep many first link memory, any of them

A Llama of about 220M parameters in float32, one thread a rank, ranks pinned to a core each; medians of five rounds. Each line ends
with the bar that it is held to.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tests.benchmarks import serving
from tests.ranks import run_ranks

BIG = {
    "vocab_size": serving.VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
SMALL = {"num_hidden_layers": 8, "tie_word_embeddings": True}
REQUESTS = 2000
LIMIT = 600.0


def line(what: str, value: str, bar: str, *, good: bool) -> None:
    """One row of the table."""
    print(f"{what:<62}{value:>18}   {bar:<24}{'ok' if good else 'BELOW ITS BAR'}", flush=True)


def decode(big: Path, _: Path) -> None:
    """(a), two stages beside two processes that share nothing."""
    for rows in (1, 4):
        ranks = run_ranks(serving.decoding, big, rows, 20, seconds=LIMIT)
        one, left, split = zip(*ranks[0], strict=True)
        both = [a + b for a, (_, b, _) in zip(left, ranks[1], strict=True)]
        share, ceiling = serving.ratio(split, both), serving.ratio(both, one)
        print(
            f"one process {median(one):.1f}, two {median(both):.1f} ({ceiling:.2f} x), two stages {median(split):.1f} tokens/s"
        )
        line(f"two stages, two groups of {rows}: of two processes", f"{share:.2f} x", ">= 0.85 x", good=share >= 0.85)


def sleep(_: Path, small: Path) -> None:
    """(a), of layers that sleep 20 ms."""
    rounds = run_ranks(serving.sleeping, small, seconds=LIMIT)[0]
    one, _, split = zip(*rounds, strict=True)
    share = serving.ratio(split, one)
    line("layers that sleep 20 ms, two stages: of one process", f"{share:.3f} x", ">= 1.9 x", good=share >= 1.9)


def many(big: Path, _: Path) -> None:
    """(b), beside transformers' own continuous batching."""
    ours = median(run_ranks(serving.many, big, seconds=LIMIT)[0])
    theirs = median(run_ranks(serving.theirs, big, world=1, seconds=LIMIT)[0])
    print(f"32 requests of mixed lengths: ours {ours:.1f}, generate_batch on two threads {theirs:.1f} tokens/s")
    line(
        "32 requests of mixed lengths: of generate_batch",
        f"{ours / theirs:.2f} x",
        ">= 1.3 x",
        good=ours / theirs >= 1.3,
    )


def first(big: Path, _: Path) -> None:
    """(c), a short prompt beside a long one."""
    chunks = median(run_ranks(serving.first_tokens, big, seconds=LIMIT)[0])
    line("first token of a short prompt beside a long one", f"{chunks:.2f} chunks", "<= 2 chunks", good=chunks <= 2)


def link(big: Path, small: Path) -> None:
    """(d), and the scheduler's own time."""
    sent, most = sum(run_ranks(serving.link, big, seconds=LIMIT)), 1.1 * BIG["hidden_size"] * 4 + 64
    line("bytes on the link for a decoded token", f"{sent:.0f}", f"<= {most:.0f}", good=sent <= most)
    own = run_ranks(serving.between_steps, small, world=1, seconds=LIMIT)[0]
    line("outside the model, a step of 8 rows", f"{own:.2f} ms", "<= 1 ms", good=own <= 1)


def memory(_: Path, small: Path) -> None:
    """2,000 requests leave resident memory flat."""
    for rank, (quarter, half, end) in enumerate(run_ranks(serving.lasting, small, REQUESTS, seconds=LIMIT)):
        grown = end - half
        what = f"rank {rank}: MiB after {REQUESTS // 4}, {REQUESTS // 2}, {REQUESTS} requests"
        value = f"{quarter:.0f} {half:.0f} {end:.0f}"
        line(what, value, "<= 1 % from half to end", good=grown <= 0.01 * half)


PARTS: dict[str, Callable[[Path, Path], None]] = {
    part.__name__: part for part in (decode, sleep, many, first, link, memory)
}


def main() -> None:
    """Measure what the command line names, or everything."""
    from transformers.utils.logging import disable_progress_bar

    from tests import models

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        big = models.make(Path(scratch) / "big", **BIG)
        small = models.make(Path(scratch) / "small", **SMALL)
        for name in sys.argv[1:] or PARTS:
            PARTS[name](big, small)


if __name__ == "__main__":
    main()
