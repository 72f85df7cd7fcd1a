"""A server at its limits, with one slot: a full queue, a killed rank, a stop while answers would take too long; in that order."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from launch.job import JobFolder
from tests.commandline import wait_for
from tests.launch.inference.server.parrot import GREETING, SINGING
from tests.launch.inference.server.serving import Served, served, serving

pytestmark = pytest.mark.timeout(400)
WHO = "<user>Who are you?<end><assistant>"
LENGTH = len(GREETING.encode()) + 1  # tokens: at most one a byte, and the end


@pytest.fixture(scope="module")
def narrow(parrots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One request at a time; in a home of its own, or the end of this server would be the end of all."""
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "model").symlink_to(parrots / "model")
    changes = {"name": "narrow", "max_num_seqs": 1, "adapter_path": None, "restart": {"max": 2, "backoff": "1s"}}
    with serving(folder, **changes) as made:
        yield made


def _long(endpoint: Served, count: int, **changes: Any) -> http.client.HTTPConnection:
    """Ask for songs that take minutes, all in one request, and do not wait for them."""
    body = {"model": "narrow", "prompt": [SINGING] * count, "max_tokens": 3500, "temperature": 0, **changes}
    connection = endpoint.connect()
    headers = {"Authorization": f"Bearer {endpoint.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def test_a_full_queue_says_when_to_come_again(narrow: Served) -> None:
    with closing(_long(narrow, 20)):
        wait_for(lambda: narrow.metric("requests_running") == 1, seconds=60)
        refused = narrow.complete([SINGING] * 20, model="narrow")
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) > 0
        assert refused.body["error"]["code"] == "queue_full"
        assert narrow.metric("requests_waiting") == 19  # none of the refused took a place
    wait_for(narrow.idle, seconds=60)
    answer = narrow.complete(WHO, model="narrow", max_tokens=LENGTH)
    assert (answer.status, answer.body["choices"][0]["text"]) == (200, GREETING)


def test_a_killed_rank_is_told_to_clients_and_the_tunnel_leads_to_the_next_server(narrow: Served) -> None:
    with narrow.commands.started("tunnel", narrow.job.id, "--json") as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        here = int(told["base_url"].split(":")[2].split("/")[0])
        assert _who(here, narrow.key) == GREETING
        with closing(_long(narrow, 1, stream=True)) as connection:
            answer = connection.getresponse()
            assert answer.read(100)
            before = narrow.job.state()
            os.kill(before.rank_pids[1], signal.SIGKILL)
            rest = _rest(answer)
        assert b"[DONE]" not in rest
        wait_for(lambda: _again(narrow.job, before.attempt), seconds=120)
        wait_for(lambda: _who(here, narrow.key) == GREETING, seconds=60)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0


def test_a_stop_takes_nothing_new_and_tells_whoever_cannot_finish(narrow: Served) -> None:
    endpoint = served(narrow.commands, narrow.job)  # the attempt before has told clients its port
    with closing(_long(endpoint, 30)) as connection:
        wait_for(lambda: endpoint.metric("requests_running") == 1, seconds=60)
        with narrow.commands.started("stop", narrow.job.id) as process:
            wait_for(lambda: endpoint.ask("/health/ready").status == 503, seconds=30)
            refused = endpoint.complete(WHO, model="narrow")
            assert refused.status == 503
            assert "stopping" in refused.body["error"]["message"]
            answer = connection.getresponse()
            assert answer.status == 503
            assert json.loads(answer.read())["error"]["message"]
            assert process.wait(100) == 0
    assert narrow.job.state().state == "stopped"


def _again(job: JobFolder, attempt: int) -> bool:
    state = job.state()
    assert not state.ended, state
    return state.state == "ready" and state.attempt > attempt


def _rest(answer: http.client.HTTPResponse) -> bytes:
    """What still comes; a connection that ends in the middle is an end too."""
    said = b""
    try:
        while piece := answer.read1():
            said += piece
    except (http.client.HTTPException, OSError):
        pass
    return said


def _who(port: int, key: str) -> str | None:
    body = json.dumps({"model": "narrow", "prompt": WHO, "temperature": 0, "max_tokens": LENGTH})
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        return str(json.loads(answer.read())["choices"][0]["text"]) if answer.status == 200 else None
    except (http.client.HTTPException, OSError, ValueError):
        return None  # it is not back yet
    finally:
        connection.close()
