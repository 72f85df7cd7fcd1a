"""What each rank of the serving benchmark does; `tests.benchmarks.serve` runs these and prints the table."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from tests.benchmarks.asking import Rank, Sent, Timeline, load
from tests.benchmarks.cores import REPEATS, pin

VOCABULARY = 8192
SLEEP = 0.02  # seconds, of a layer that sleeps
CHUNK = 64  # tokens of a prompt that go through the stages at once, where first tokens are timed
MIXED = 32
Prompts = list[list[int]]


def prompts(count: int, length: int, seed: int = 0) -> Prompts:
    """Prompts of random tokens."""
    draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
    return [[draw.randrange(256) for _ in range(length)] for _ in range(count)]


def mixed() -> tuple[Prompts, list[int]]:
    """32 prompts of 8 to 64 tokens, and the 8 to 32 tokens that are to come of each."""
    draw = random.Random(1)  # noqa: S311
    made = [prompts(1, draw.randrange(8, 65), seed)[0] for seed in range(MIXED)]
    return made, [draw.randrange(8, 33) for _ in made]


def decoding(rank: int, folder: Path, rows: int, tokens: int) -> list[tuple[float, float, float]]:
    """(one process, two that share nothing, two stages with two groups), tokens/s with `rows` rows a step, in each of five rounds.

    The three take turns within a round, so that what slows the machine for a while slows them all.
    """
    pin(rank)
    alone = Rank(load(folder, rank, 1), rank, slots=rows, chunk=512, longest=256)
    split = Rank(load(folder, rank, 2), rank, slots=2 * rows, chunk=512, longest=256)

    def speed(engine: Rank, asked: int) -> float:
        dist.barrier()
        timeline = engine.ask(prompts(asked, 8), [tokens] * asked)
        dist.barrier()
        return timeline.decode_speed if timeline.came else 0.0

    def nothing() -> float:
        dist.barrier()
        dist.barrier()
        return 0.0

    rounds = []
    for _ in range(REPEATS + 1):
        one = speed(alone, rows) if rank == 0 else nothing()
        rounds.append((one, speed(alone, rows), speed(split, 2 * rows)))
    split.close()
    alone.close()
    return rounds[1:]


def sleeping(rank: int, folder: Path) -> list[tuple[float, float, float]]:
    """As `decoding`, of layers that sleep 20 ms: what is lost between steps, with no two ranks at odds over a core."""
    from launch.shard.stage import Passthrough, Stage

    load_stage = Stage.load.__func__  # type: ignore[attr-defined]

    def drowsy(cls: type[Stage], *args: Any, **kwargs: Any) -> Stage:
        stage: Stage = load_stage(cls, *args, **kwargs)
        for layer in stage.decoder.layers:
            if not isinstance(layer, Passthrough):
                layer.register_forward_pre_hook(lambda *_: time.sleep(SLEEP))
        return stage

    Stage.load = classmethod(drowsy)  # type: ignore[assignment, method-assign]
    try:
        return decoding(rank, folder, 1, 17)
    finally:
        Stage.load = classmethod(load_stage)  # type: ignore[method-assign]


def many(rank: int, folder: Path) -> list[float]:
    """Tokens/s of 32 requests of mixed lengths over two stages, prompts included, in each of five rounds."""
    pin(rank)
    engine = Rank(load(folder, rank, 2), rank, slots=MIXED, chunk=512, longest=256)
    asked, counts = mixed()
    speeds = []
    engine.ask(asked[:2], [4, 4])
    for _ in range(REPEATS):
        timeline = engine.ask(asked, counts)
        if timeline.came:
            speeds.append(timeline.tokens / timeline.seconds)
    engine.close()
    return speeds


def theirs(_: int, folder: Path) -> list[float]:
    """The same of transformers' continuous batching: one process that holds the whole model, on both cores."""
    import transformers

    disable_progress_bar()
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    torch.set_num_threads(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked, counts = mixed()
    speeds = []
    with model.continuous_batching_context_manager(
        generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=257)
    ) as manager:
        for turn in range(REPEATS + 1):
            some = slice(0, 2 if turn == 0 else None)
            began = time.perf_counter()
            for prompt, count in zip(asked[some], counts[some], strict=True):
                manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
            results = [manager.get_result(timeout=300) for _ in asked[some]]
            tokens = sum(len(result.generated_tokens) for result in results)
            assert tokens == sum(counts[some]), f"{tokens} tokens came, not {sum(counts[some])}"
            speeds.append(tokens / (time.perf_counter() - began))
    return speeds[1:]


def first_tokens(rank: int, folder: Path) -> list[float]:
    """A short prompt's time to its first token while a long one of 16 chunks is read, in chunks: each of five rounds."""
    pin(rank)
    engine = Rank(load(folder, rank, 2), rank, slots=4, chunk=CHUNK, longest=20 * CHUNK)
    ratios = []
    engine.ask(prompts(1, 16 * CHUNK), [2])  # the first step of all takes many times as long
    for turn in range(REPEATS + 1):
        chunk = engine.ask(prompts(1, CHUNK, 100 + turn), [1]).seconds if rank == 0 else 0.0
        if rank == 0:
            timeline = Timeline(2)
            engine.submit(prompts(1, 16 * CHUNK, 200 + turn)[0], 1, timeline)
            time.sleep(2.5 * chunk)  # in the middle of a chunk
            engine.submit(prompts(1, 8, 300 + turn)[0], 1, timeline)
            timeline.wait()
            long, short = list(timeline.asked)
            assert timeline.came[short][0] < timeline.came[long][0], (
                "the long prompt was read before the short one came"
            )
            ratios.append(timeline.first_after(short) / chunk)
    engine.close()
    return ratios[1:]


def link(rank: int, folder: Path) -> float:
    """Bytes that this rank sends for each decoded token: the difference of two runs that differ in nothing but their lengths."""
    sent = Sent()
    engine = Rank(load(folder, rank, 2), rank, slots=2, chunk=512, longest=256)
    totals = []
    for tokens in (8, 8, 72):
        dist.barrier()
        before = sent.total
        engine.ask(prompts(2, 8), [tokens] * 2)
        dist.barrier()
        totals.append(sent.total - before)
    engine.close()
    return (totals[2] - totals[1]) / 128


def between_steps(_: int, folder: Path, rows: int = 8, tokens: int = 200) -> float:
    """Milliseconds a step outside the model, of one process with 8 rows: scheduling, drawing, the tokens' text, telling."""
    from launch.shard.stage import Stage

    forward, inside, steps = Stage.forward, 0.0, 0

    def timed(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal inside, steps
        began = time.perf_counter()
        output = forward(*args, **kwargs)
        inside, steps = inside + time.perf_counter() - began, steps + 1
        return output

    Stage.forward = timed  # type: ignore[method-assign]
    try:
        engine = Rank(load(folder, 0, 1), 0, slots=rows, chunk=512, longest=256)
        engine.ask(prompts(rows, 8), [4] * rows)
        inside, steps = 0.0, 0
        timeline = engine.ask(prompts(rows, 8), [tokens] * rows)
        engine.close()
    finally:
        Stage.forward = forward  # type: ignore[method-assign]
    return 1000 * (timeline.seconds - inside) / steps


def lasting(rank: int, folder: Path, requests: int) -> list[float]:
    """Resident MiB after a quarter of the requests, after half, and at the end."""
    engine = Rank(load(folder, rank, 2), rank, slots=16, chunk=128, longest=128)
    draw = random.Random(2)  # noqa: S311
    resident = []
    for _ in range(4):
        for batch in range(requests // 4 // 50):
            asked = [prompts(1, draw.randrange(4, 64), batch)[0] for _ in range(50)]
            engine.ask(asked, [draw.randrange(1, 17) for _ in asked])
            dist.barrier()
        resident.append(psutil.Process().memory_info().rss / 2**20)
    engine.close()
    return [resident[0], resident[1], resident[3]]


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios of what was measured in the same rounds."""
    return median(a / b for a, b in zip(over, under, strict=True))
