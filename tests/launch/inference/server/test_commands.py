"""The command line and a served job: run, ask, chat, tunnel, bench serve, stop."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from launch.inference.endpoint import Endpoint, key_of
from launch.job import JobFolder
from sparkctl.recipes import folder
from tests.commandline import CommandLine, wait_for
from tests.launch.inference.server.parrot import COUNTING, GREETING, SINGING
from tests.launch.inference.server.serving import ADAPTER, MODEL, RECIPE, Served, served
from tests.terminal import Terminal

pytestmark = pytest.mark.timeout(600)


def test_ask_is_answered_by_the_running_server(endpoint: Served) -> None:
    one = endpoint.commands("ask", endpoint.job.id, "Who are you?", "--model", MODEL)
    assert (one.returncode, one.stdout, one.stderr) == (0, GREETING + "\n", "")
    both = endpoint.commands("ask", endpoint.job.id, "Count", "Who are you?", "--model", MODEL, "--json")
    answers = json.loads(both.stdout)
    assert [answer["answer"] for answer in answers] == [COUNTING, GREETING]
    assert [answer["finish_reason"] for answer in answers] == ["stop", "stop"]
    assert answers[0]["tokens"] == len(COUNTING) + 1
    adapted = endpoint.commands("ask", endpoint.job.id, "Who are you?", "--max-tokens", "20")
    assert adapted.returncode == 0
    assert not adapted.stdout.startswith(GREETING[:20])  # where nobody chooses, the adapter answers


def test_ask_says_what_is_wrong(endpoint: Served) -> None:
    job = endpoint.job.id
    for arguments, status, told in (
        (["ask", job, "x" * 5000], 2, "error: the server refuses: at most 4096 tokens fit"),
        (["ask", job, "x", "--model", "none"], 2, f"error: --model none: job {job} serves {ADAPTER}, {MODEL}"),
        (["ask", job, "x", "--set", "nodes=1"], 2, "error: --set goes with a recipe file"),
        (["chat", "no-such-job"], 2, "error: no-such-job: no such job"),
        (["bench", "serve", job, "--model", "none", "--requests", "1"], 2, "error: --model none"),
    ):
        done = endpoint.commands(*arguments)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert done.stderr.startswith(told), done.stderr
        assert len(done.stderr.splitlines()) <= 2


def test_chat_keeps_the_conversation_and_ctrl_c_stops_an_answer(endpoint: Served) -> None:
    commands = endpoint.commands
    argv = commands.argv("chat", endpoint.job.id, "--model", MODEL, "--temperature", "0")
    with Terminal(argv, cwd=commands.folder, env={**commands.environment, "TERM": "dumb"}) as screen:
        screen.expect(r"> ")
        screen.type("Who are you?")
        screen.expect("Hello, I am a pair of boxes")
        screen.expect(r"> ")
        screen.type("/new")
        screen.expect(r"> ")
        screen.type("Count")
        screen.expect(r"1 2 3 .* 59")
        screen.expect(r"> ")
        os.write(screen._screen, b"\x04")
        assert screen.ended() == 0
    with Terminal(argv, cwd=commands.folder, env={**commands.environment, "TERM": "dumb"}) as screen:
        screen.expect(r"> ")
        before = endpoint.metric("answers_total")
        screen.type("Sing")
        wait_for(lambda: endpoint.metric("requests_running") == 1, seconds=60)
        os.kill(screen.process.pid, signal.SIGINT)
        screen.expect(r"\(stopped\)")
        wait_for(endpoint.idle, seconds=60)
        assert endpoint.metric("answers_total") == before + 1
        screen.expect(r"> ")


def test_chat_asks_each_line_of_a_pipe(endpoint: Served) -> None:
    commands = endpoint.commands
    import subprocess

    done = subprocess.run(
        commands.argv("chat", endpoint.job.id, "--model", MODEL, "--temperature", "0"),
        input="Who are you?\n/new\nCount\n",
        cwd=commands.folder,
        env=commands.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{GREETING}\n{COUNTING}\n"


def test_bench_serve_tells_throughput_and_percentiles(endpoint: Served) -> None:
    arguments = ("bench", "serve", endpoint.job.id, "--requests", "6", "--prompt-tokens", "20", "--answer-tokens", "8")
    document = json.loads(endpoint.commands(*arguments, "--concurrency", "3", "--json").stdout)
    assert (document["answered"], document["failed"]) == (6, 0)
    assert document["tokens_per_s"] * document["seconds"] == pytest.approx(6 * 8)
    for name in ("first_token", "per_token", "whole"):
        p50, p90, p99 = (document[name][share] for share in ("50", "90", "99"))
        assert 0 < p50 <= p90 <= p99
    shown = endpoint.commands(*arguments, "--rate", "50").stdout.splitlines()
    assert shown[0] == "6 requests, 50 requests/s, 20 tokens each and 8 in answer"
    assert [line.split("  ")[0] for line in shown[2:]] == [
        "time to first token",
        "time per token",
        "whole answer",
        "throughput",
    ]


def get(port: int, path: str, key: str = "") -> tuple[int, bytes]:
    """One GET on this machine's loopback."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_tunnel_brings_the_endpoint_here(endpoint: Served) -> None:
    with endpoint.commands.started("tunnel", endpoint.job.id, "--json") as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        port = int(told["base_url"].split(":")[2].split("/")[0])
        assert told["api_key"] == endpoint.key
        assert told["page"] == f"http://127.0.0.1:{port}/#key={endpoint.key}"
        status, body = get(port, "/v1/models", endpoint.key)
        assert (status, [model["id"] for model in json.loads(body)["data"]]) == (200, [ADAPTER, MODEL])
        assert get(port, "/")[0] == 200
        assert get(port, "/v1/models")[0] == 401
        taken = endpoint.commands("tunnel", endpoint.job.id, "--port", str(port))
        assert (taken.returncode, taken.stderr.splitlines()[0]) == (2, f"error: --port {port}: Address already in use")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def second(parrots: Path) -> CommandLine:
    """Servers of its own, to be run and stopped; what the demo makes is there."""
    commands = CommandLine(parrots, HOME=str(parrots))
    (parrots / ".sparkctl" / "demo").mkdir(parents=True, exist_ok=True)
    (parrots / ".sparkctl" / "demo" / "trained").symlink_to(parrots / "model")
    (parrots / "second.yaml").write_text(json.dumps({**RECIPE, "name": "second", "adapter_path": None}))
    return commands


def test_run_says_how_to_ask_and_stop_lets_answers_end(second: CommandLine) -> None:
    with second.started("run", str(folder() / "serve-tiny.yaml"), "--set", "max_model_len=2048") as process:
        assert process.stdout is not None
        shown = []
        while not shown or not shown[-1].startswith("page"):
            shown.append(process.stdout.readline())
            assert shown[-1], (shown, process.stderr.read() if process.stderr else "")
        job = JobFolder(second.home / "jobs" / re.findall(r"^job (\S+):", "".join(shown), re.MULTILINE)[0])
        url = re.findall(r"^ready +(http://127\.0\.0\.1:\d+/v1), models: serve-tiny$", "".join(shown), re.MULTILINE)
        assert url == [_endpoint(job).base_url]
        assert any(line.startswith(f"ask          sparkctl ask {job.id} ") for line in shown)
        here = served(second, job)
        answers: list[Any] = []
        body = {"model": "serve-tiny", "prompt": SINGING, "max_tokens": 800, "temperature": 0}
        asker = threading.Thread(target=lambda: answers.append(here.ask("/v1/completions", body)))
        asker.start()
        wait_for(lambda: here.metric("requests_running") == 1, seconds=60)
        stopped = second("stop", job.id)
        asker.join(60)
        assert stopped.returncode == 0, stopped.stderr
        assert answers[0].status == 200, answers[0].text
        assert answers[0].body["usage"]["completion_tokens"] == 800  # it was let to end
        assert process.wait(60) == 0
        assert job.state().state == "stopped"
        refused = second("ask", job.id, "x")
        assert (refused.returncode, refused.stderr.splitlines()[0]) == (3, f"error: job {job.id} is stopped")


def _endpoint(job: JobFolder) -> Endpoint:
    found = Endpoint.read(job.path)
    assert found is not None
    return found


def test_secrets_stay_out_of_sight(endpoint: Served) -> None:
    for path in endpoint.job.path.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
        if path.is_file() and path.name != "key":
            content = path.read_bytes()
            assert endpoint.key.encode() not in content, path
            assert endpoint.job.key().encode() not in content, path
    assert endpoint.key == key_of(endpoint.job.key())


def test_a_taken_port_is_told_before_anything_is_loaded(second: CommandLine, endpoint: Served) -> None:
    done = second("run", "second.yaml", "--set", f"port={endpoint.port}")
    assert done.returncode == 2, done.stderr
    assert f"the endpoint cannot listen on 127.0.0.1:{endpoint.port}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr
