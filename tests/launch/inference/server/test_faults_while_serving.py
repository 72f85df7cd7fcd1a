"""A rank dies while answers are written: who asked is told, or cut off, at once, and the endpoint comes back where it was."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.commandline import wait_for
from tests.launch.inference.server.serving import RECIPE, Served, served, serving

pytestmark = pytest.mark.timeout(900)

# What the issue allows a client to wait for its error; ordinarily it is a second or two.
TOLD_WITHIN = 30.0
BACK_WITHIN = 300.0


@pytest.fixture(scope="module")
def endpoint(parrots: Path) -> Iterator[Served]:
    """A server that is started again whenever it fails."""
    with serving(
        parrots, name="mended", adapter_path=None, served_model_name="parrot", restart={"max": 9, "backoff": "1s"}
    ) as made:
        yield made


@dataclass
class Asker:
    """A client who streams a long answer: what came of it, and when it was over."""

    endpoint: Served
    came: bytes = b""
    status: int = 0
    cut: str = ""
    over: threading.Event = field(default_factory=threading.Event)
    ended: float = 0.0

    def ask(self) -> None:
        """Read until the end, however it comes."""
        body = {"model": "parrot", "prompt": "sing", "max_tokens": 4000, "stream": True, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {self.endpoint.key}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection(self.endpoint.host, self.endpoint.port, timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body | {"temperature": 0}), headers)
            response = connection.getresponse()
            self.status = response.status
            while piece := response.read1(4096):
                self.came += piece
        except (OSError, http.client.HTTPException) as error:
            self.cut = f"{type(error).__name__}: {error}"
        finally:
            connection.close()
            self.ended = time.monotonic()
            self.over.set()

    @property
    def events(self) -> list[str]:
        """The whole events of the stream."""
        return [block.removeprefix("data: ") for block in self.came.decode().split("\n\n")[:-1]]


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_rank_hangs_no_client_and_the_endpoint_comes_back_where_it_was(endpoint: Served, rank: int) -> None:
    before = endpoint.job.state()
    asked = endpoint.complete("sing", max_tokens=12).body["choices"][0]["text"]
    askers = [Asker(endpoint) for _ in range(6)]  # two more than there are slots: they wait in the queue
    for asker in askers:
        threading.Thread(target=asker.ask, daemon=True).start()
    wait_for(lambda: sum(b"data: " in asker.came for asker in askers) >= RECIPE["max_num_seqs"], seconds=120)
    killed = time.monotonic()
    os.kill(before.rank_pids[rank], signal.SIGKILL)
    for asker in askers:
        assert asker.over.wait(TOLD_WITHIN), f"a client still waits {TOLD_WITHIN:g} s later"
        assert asker.ended - killed < TOLD_WITHIN
        told_of_it = any("error" in json.loads(event) for event in asker.events if event != "[DONE]")
        refused = asker.status in (500, 503)
        assert asker.cut or told_of_it or refused, "an answer that was cut off must not look whole"
        assert "[DONE]" not in asker.events or told_of_it

    def back() -> bool:
        state = endpoint.job.state()
        assert not state.ended, state
        return state.state == "ready" and state.attempt == before.attempt + 1

    wait_for(back, seconds=BACK_WITHIN)
    again = served(endpoint.commands, endpoint.job)
    assert (again.host, again.port, again.key) == (endpoint.host, endpoint.port, endpoint.key)
    assert endpoint.complete("sing", max_tokens=12).body["choices"][0]["text"] == asked
