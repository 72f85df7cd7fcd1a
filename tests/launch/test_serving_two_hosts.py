"""A served model over two hosts, from a laptop: run, ask, tunnel, stop; nothing listens but on loopback."""

from __future__ import annotations

import http.client
import json
import signal
import time

import pytest

from tests.laptop import Laptop

pytestmark = pytest.mark.timeout(600)


def test_a_laptop_asks_what_two_hosts_serve(laptop: Laptop) -> None:
    recipe = {"kind": "inference", "name": "served", "base_model": "./model", "max_model_len": 128, "port": 0}
    (laptop.shared / "served.yaml").write_text(json.dumps(recipe))
    job = laptop.detach("served.yaml")
    try:
        asked = laptop("ask", job, "What is 3?", "--max-tokens", "8", "--json", seconds=400)
        assert asked.returncode == 0, asked.stderr
        (answer,) = json.loads(asked.stdout)
        assert (answer["tokens"], answer["finish_reason"]) in {(8, "length"), (answer["tokens"], "stop")}
        with laptop.started("tunnel", job, "--json") as process:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            port = int(told["base_url"].split(":")[2].split("/")[0])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            body = {
                "model": "served",
                "messages": [{"role": "user", "content": "What is 3?"}],
                "max_tokens": 8,
                "temperature": 0,
            }
            headers = {"Authorization": f"Bearer {told['api_key']}", "Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            answered = json.loads(response.read())
            assert response.status == 200, answered
            assert answered["choices"][0]["message"]["content"] == answer["answer"]
            connection.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
    finally:
        stopped = laptop("stop", job, seconds=200)
    assert stopped.returncode == 0, stopped.stderr
    deadline = time.monotonic() + 60
    while laptop.remains() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert laptop.remains() == []
