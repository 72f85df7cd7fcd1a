"""How fast it will be: rooflines (Williams et al. 2009) of bytes, floating-point operations and messages, not measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from launch.box import Speeds
from launch.capacity import NF4_TOKENS
from launch.model_card import ModelCard, Part
from launch.precision import Kind, Precision, Weight
from launch.split import Cut
from launch.workload import Serving, Training, Workload

# With one machine's cores nothing but the proportions count: about those of one core, in 32 bits.
PROPORTIONS = Speeds(
    memory=10e9, memory_share=1, flops=50e9, flops_share=1, link=1e9, hop=0, disk=1e9, layer=0, sources=()
)


@dataclass(frozen=True)
class ServingSpeed:
    """Tokens/s: of one sequence alone, of all at once, of a long prompt; and the seconds until everything is loaded."""

    one: float
    full: float
    prefill: float
    load: float


@dataclass(frozen=True)
class TrainingSpeed:
    """Seconds of an optimizer step and to load everything; tokens/s learned from, counting `length` tokens a sample."""

    step: float
    tokens: float
    load: float


class Clock:
    """Seconds that parts of a model take at given speeds."""

    def __init__(self, card: ModelCard, precision: Precision, speeds: Speeds) -> None:
        self.card, self.precision, self.speeds = card, precision, speeds
        self._passes: dict[tuple[int, int, int, int], float] = {}

    def layer(self, part: Part, tokens: int, rows: int = 0, past: float = 0) -> float:
        """One layer, forward.

        seconds = max(bytes / memory bandwidth, operations / compute, time to start the kernels), where
        bytes = weights read (of a mixture those of the experts that are hit) + keys and values read,
        operations = 2 x active parameters x tokens + 4 x query width x past x tokens (scores and their sum).

        Args:
            tokens: how many go through at once.
            rows: of how many sequences.
            past: how many tokens each of them attends to.
        """
        key = (id(part), tokens, rows, int(past))  # layers that are alike are one object
        if key not in self._passes:
            moved = sum(self._read(weight, tokens) for weight in part.weights)
            if part.cache is not None and rows:
                moved += rows * part.cache.size(int(past), self.precision.compute)
            active = sum(self._active(weight) for weight in part.weights)
            attention = 4 * self._query(part) * (part.cache.tokens(int(past)) if part.cache else 0)
            operations = tokens * (2 * active + attention)
            seconds = max(moved / self.speeds.read, operations / self.speeds.compute, self.speeds.layer)
            self._passes[key] = seconds
        return self._passes[key]

    def head(self, tokens: int) -> float:
        """The head, on `tokens` positions: max(bytes / memory bandwidth, 2 x hidden x vocabulary x tokens / compute)."""
        size = self.card.hidden_size * self.card.vocab_size
        return max(size * self.precision.element / self.speeds.read, 2 * size * tokens / self.speeds.compute)

    def message(self, tokens: int) -> float:
        """Hidden states over the link: a fixed time, and bytes / bandwidth."""
        return self.speeds.hop + tokens * self.card.hidden_size * self.precision.element / self.speeds.link

    def _active(self, weight: Weight) -> float:
        if weight.kind is Kind.EXPERT:
            return weight.parameters * self.card.experts_per_token / self.card.experts
        return weight.parameters if weight.rows else 0

    def _read(self, weight: Weight, tokens: int) -> float:
        """Bytes moved to use a weight once on `tokens` tokens.

        Of E experts, of which each token takes k evenly, 1 - (1 - k / E)^tokens are hit. A matrix in NF4 is expanded for more than
        NF4_TOKENS tokens: written and read once more in 16 bits.
        """
        share = 1.0
        if weight.kind is Kind.EXPERT:
            share = 1 - (1 - self.card.experts_per_token / self.card.experts) ** tokens
            tokens = max(1, round(tokens * self.card.experts_per_token / self.card.experts))  # for each expert
        size: float = self.precision.size(weight)
        if self.precision.is_quantized(weight) and tokens > NF4_TOKENS:
            size += 2 * weight.parameters * self.precision.compute
        return share * size

    def _query(self, part: Part) -> int:
        """How wide all heads together are, as the matrix says that takes their result."""
        return next((weight.columns for weight in part.weights if weight.name.endswith("o_proj.weight")), 0)


def costs(clock: Clock, work: Workload) -> tuple[Callable[[Part], float], float]:
    """What decides the cut, in seconds, for a layer and for the head.

    Serving: a decoding step of half the sequences, caches half full. Training: a micro-batch forward and backward. The embedding
    occupies memory but computes nothing.
    """
    if isinstance(work, Training):
        return partial(_both_ways, clock, work=work), 3 * clock.head(work.tokens)
    rows = max(1, work.sequences // 2)
    return partial(clock.layer, tokens=rows, rows=rows, past=work.context / 2), clock.head(rows)


def serving(clocks: Sequence[Clock], cuts: Sequence[Cut], work: Serving) -> ServingSpeed:
    """Predict decoding and prefill of stages, caches half full.

    one = 1 / (sum of stages + a message for each stage: hidden states forward, tokens back).
    full: two groups of half the sequences take turns, so a round of both takes the longer of twice the slowest stage, and of
    all stages with their messages; it yields a token for each sequence.
    prefill = chunk / slowest stage: chunks of long prompts follow one another through the stages.
    """
    past = work.context / 2

    def round_trip(rows: int) -> tuple[list[float], float]:
        stages = [_stage(clock, cut, rows, rows, past) for clock, cut in zip(clocks, cuts, strict=True)]
        return stages, sum(stages) + (len(stages) * clocks[0].message(rows) if len(stages) > 1 else 0)

    _, alone = round_trip(1)
    stages, together = round_trip(max(1, -(-work.sequences // 2)))
    cycle = max(2 * max(stages), together) if work.sequences > 1 else together
    chunk = max(
        _stage(clock, cut, work.chunk, 1, past, logits=1) + (clock.message(work.chunk) if len(cuts) > 1 else 0)
        for clock, cut in zip(clocks, cuts, strict=True)
    )
    return ServingSpeed(one=1 / alone, full=work.sequences / cycle, prefill=work.chunk / chunk, load=load(clocks, cuts))


def pipeline(clocks: Sequence[Clock], cuts: Sequence[Cut], work: Training, trained: int) -> TrainingSpeed:
    """Predict a step of the pipeline: (micro-batches + stages - 1) x slowest stage + filling and draining the link + the optimizer.

    Narayanan et al. 2021 (arXiv:2104.04473): with 1F1B the bubble is (stages - 1) / micro-batches. `trained` numbers on the
    fullest stage are read and written with their gradients and two moments: 7 x 4 bytes.
    """
    stages = [
        sum(_both_ways(clock, part, work=work) for part in clock.card.stack[cut.start : cut.end])
        + (3 * clock.head(work.tokens) if cut.last else 0)
        for clock, cut in zip(clocks, cuts, strict=True)
    ]
    beats = work.micro_batches + len(stages) - 1
    messages = 2 * (len(stages) - 1) * clocks[0].message(work.tokens)
    step = beats * max(stages) + messages + 28 * trained / clocks[0].speeds.read
    return TrainingSpeed(step, work.tokens * work.micro_batches / step, load(clocks, cuts))


def data_parallel(clock: Clock, work: Training, *, gathered: int, trained: int) -> TrainingSpeed:
    """Predict a step in which two ranks each take half the micro-batches through the whole model.

    Every pass takes the longer of computing and of gathering `gathered` bytes of weights over the link (half of them are there;
    forward and backward each gather: Rajbhandari et al. 2020, arXiv:1910.02054); then gradients of `trained` numbers cross it once.
    """
    card = clock.card
    whole = Cut(0, card.layers, card.layers)
    compute = sum(_both_ways(clock, part, work=work) for part in card.stack) + 3 * clock.head(work.tokens)
    passes = 3 if work.checkpointing else 2
    gathering = passes * (gathered / 2) / clock.speeds.link
    micro_batches = max(1, -(-work.micro_batches // 2))
    step = micro_batches * max(compute, gathering) + 4 * trained / clock.speeds.link + 28 * trained / clock.speeds.read
    return TrainingSpeed(step, work.tokens * work.micro_batches / step, load([clock], [whole]))


def load(clocks: Sequence[Clock], cuts: Sequence[Cut]) -> float:
    """Seconds until the slowest stage has read its own part of the checkpoint: stored bytes / disk bandwidth."""
    return max(stored(clock.card, cut) / clock.speeds.disk for clock, cut in zip(clocks, cuts, strict=True))


def stored(card: ModelCard, cut: Cut) -> int:
    """Bytes of the checkpoint that a stage reads."""
    total = sum(card.layer_bytes[cut.start : cut.end])
    if cut.first:
        total += card.embedding_bytes
    if cut.last:
        total += card.head_bytes if cut.first else card.head_cost
    return total


def _stage(clock: Clock, cut: Cut, tokens: int, rows: int, past: float, *, logits: int | None = None) -> float:
    inside = sum(clock.layer(part, tokens, rows, past) for part in clock.card.stack[cut.start : cut.end])
    return inside + (clock.head(tokens if logits is None else logits) if cut.last else 0)


def _both_ways(clock: Clock, part: Part, *, work: Training) -> float:
    """A micro-batch forward and backward through a layer.

    Backward costs as much as forward for the gradient of what went in, and as much again for that of trained weights; with
    checkpointing forward is done twice. Tokens attend to half of their sequence.
    """
    forward = clock.layer(part, work.tokens, 0, work.length / 2)
    return forward * (2 + (work.rank is None) + work.checkpointing)
