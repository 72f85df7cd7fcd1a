"""What an engine over two ranks keeps up for as long as it runs: its buffers, its place in the group, everybody's turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from launch.inference import engine
from launch.inference.intake import Intake, Tokens
from launch.inference.link import Link
from launch.inference.request import GenerationRequest, Sampling
from launch.inference.wire import Order
from tests import models
from tests.launch.inference import engines
from tests.launch.inference.engines import Heard
from tests.ranks import run_ranks

FREE = Sampling(ignore_eos=True)
WITHIN = 300.0
# They guard against hanging, no more.
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make(tmp_path_factory.mktemp("steady") / "model")


def prompt(number: int, length: int = 12) -> tuple[int, ...]:
    return tuple((37 * number + 11 * place) % 250 for place in range(length))


def alone(folder: Path, requests: list[GenerationRequest]) -> dict[str, list[int]]:
    """What `generate` answers to each, asked nothing else."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = {}
    for request in requests:
        ids = torch.tensor([list(request.prompt)])
        settings = transformers.GenerationConfig(max_new_tokens=request.max_tokens, do_sample=False, pad_token_id=257)
        drawn = whole.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, eos_token_id=None)
        answers[request.id] = drawn[0][len(request.prompt) :].tolist()
    return answers


# ---- buffers


class _Traffic:
    """The addresses of everything that this rank sends and receives, and the link that does it."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.links: list[Link] = []
        for name in ("isend", "irecv", "send", "recv"):
            setattr(dist, name, self._noting(getattr(dist, name)))

        def made(*args: Any) -> Link:
            self.links.append(Link(*args))
            return self.links[-1]

        engine.Link = made  # type: ignore[assignment, misc]

    def _noting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(tensor.untyped_storage().data_ptr())
            return real(tensor, *args, **kwargs)

        return call


def decode_for_long(rank: int, folder: Path) -> tuple[int, set[int], set[int]]:
    """How often this rank sent or received while four answers were written, from which memory, and where its buffers lie."""
    traffic = _Traffic()
    requests = [GenerationRequest(str(number), prompt(number), 90, FREE) for number in range(4)]
    engines.serve(rank, engines.stage(folder, rank, 2), lambda intake, heard: engines.ask_all(intake, heard, requests))
    # All of it but the beginning, in which buffers grow, and the very end.
    steady = traffic.seen[len(traffic.seen) // 3 :]
    return len(steady), set(steady), traffic.links[0].buffers


def test_steady_decoding_sends_and_receives_in_the_same_few_buffers(model: Path) -> None:
    for times, used, buffers in run_ranks(decode_for_long, model, seconds=WITHIN):
        assert times > 200
        assert used <= buffers, "memory was sent from, or received into, that is not a buffer of the link"
        assert len(buffers) <= 12


# ---- more than there is room for


def crowd() -> list[GenerationRequest]:
    return [GenerationRequest(str(number), prompt(number), 20 + number, FREE) for number in range(14)]


def answer_crowd(rank: int, folder: Path) -> tuple[dict[str, list[int]], list[str], int]:
    """14 requests for 4 slots with room for less than four of them: tokens, the order they began in, how many were put aside."""
    aside = 0

    def ask(intake: Intake, heard: Heard) -> None:
        nonlocal aside
        engines.ask_all(intake, heard, crowd())
        aside = intake.stats().preempted

    heard = engines.serve(rank, engines.stage(folder, rank, 2), ask, slots=4, room=110)
    began = [request for request, events in heard.events.items() if any(isinstance(one, Tokens) for one in events)]
    return heard.tokens, began, aside


def test_whoever_is_put_aside_for_want_of_room_is_answered_as_if_alone_and_first_come_is_first_served(
    model: Path,
) -> None:
    tokens, began, aside = run_ranks(answer_crowd, model, seconds=WITHIN)[0]
    assert aside > 0
    assert began == [request.id for request in crowd()]
    assert tokens == alone(model, crowd())


# ---- idle


IDLE_HEADERS = 20
GROUP_GIVES_UP = timedelta(seconds=8)


def idle_for_long(rank: int, folder: Path) -> dict[str, list[int]]:
    """One request, then a rest that is longer than the group's time-out, then another."""
    real, signal = dist.new_group, Link.signal
    dist.new_group = lambda **how: real(**{**how, "timeout": GROUP_GIVES_UP})
    engine.IDLE_EVERY = 0.5
    rested = threading.Semaphore(0)

    def counted(self: Link, order: Order) -> None:
        signal(self, order)
        if order == Order.IDLE:
            rested.release()

    Link.signal = counted  # type: ignore[method-assign]

    def ask(intake: Intake, heard: Heard) -> None:
        intake.submit(GenerationRequest("before", prompt(1), 6, FREE), heard.note)
        heard.wait(lambda: "before" in heard.reasons)
        for _ in range(IDLE_HEADERS):
            assert rested.acquire(timeout=60)
        intake.submit(GenerationRequest("after", prompt(2), 6, FREE), heard.note)
        heard.wait(lambda: "after" in heard.reasons)

    return engines.serve(rank, engines.stage(folder, rank, 2), ask).tokens


def test_an_idle_server_outlives_the_time_out_of_its_group(model: Path) -> None:
    assert GROUP_GIVES_UP.total_seconds() < 0.5 * IDLE_HEADERS
    tokens = run_ranks(idle_for_long, model, seconds=WITHIN)[0]
    assert tokens == alone(
        model, [GenerationRequest(name, prompt(number), 6, FREE) for number, name in ((1, "before"), (2, "after"))]
    )
