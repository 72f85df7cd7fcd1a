"""What the endpoint answers: the right text however it is asked, and 4xx for whatever is wrong."""

from __future__ import annotations

import concurrent.futures
import json
import random
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launch.chat import encode_messages
from tests.commandline import wait_for
from tests.launch.inference.server.parrot import CALL, COUNTING, GREETING, SINGING, WEATHER
from tests.launch.inference.server.serving import ADAPTER, MODEL, Served

pytestmark = pytest.mark.timeout(600)  # the first test waits for the endpoint

WHO, COUNT = "Who are you?", "Count"
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def reference(parrots: Path) -> tuple[Any, Any]:
    """The same model and tokenizer in this process."""
    return (
        transformers.AutoModelForCausalLM.from_pretrained(parrots / "model").eval(),
        transformers.AutoTokenizer.from_pretrained(parrots / "model"),
    )


def prompt_of(tokenizer: Any, text: str) -> list[int]:
    """A question as the model sees it."""
    return encode_messages(tokenizer, [{"role": "user", "content": text}])


def streamed(events: list[dict[str, Any]]) -> str:
    """The text of a chat's stream."""
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def test_a_chat_is_answered_with_usage(endpoint: Served) -> None:
    answer = endpoint.chat(WHO)
    assert answer.status == 200, answer.text
    choice = answer.body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": GREETING}
    assert choice["finish_reason"] == "stop"
    assert answer.body["object"] == "chat.completion"
    usage = answer.body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == len(GREETING.encode()) + 1


def test_a_stream_brings_the_same_in_pieces(endpoint: Served) -> None:
    answer = endpoint.chat(WHO, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = answer.events
    assert streamed(events) == GREETING
    assert len(events) > 10
    assert "\ufffd" not in answer.text  # a character is told when all its bytes have come
    assert [event["choices"][0]["finish_reason"] for event in events][-2:] == [None, "stop"]
    assert last["choices"] == []
    assert last["usage"] == endpoint.chat(WHO).body["usage"] | {
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
    }
    assert len({event["id"] for event in [*events, last]}) == 1


def test_answers_to_many_at_once_do_not_mix(endpoint: Served) -> None:
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(endpoint.chat, [WHO, COUNT] * 6))
    texts = [answer.body["choices"][0]["message"]["content"] for answer in answers]
    assert texts == [GREETING, COUNTING] * 6


def test_every_form_of_a_prompt_is_gone_on_with(endpoint: Served, reference: tuple[Any, Any]) -> None:
    _, tokenizer = reference
    ids = prompt_of(tokenizer, WHO)
    text, long = tokenizer.decode(ids), 200
    for prompt, count in ((text, 1), ([text, text], 2), (ids, 1), ([ids, ids], 2)):
        answer = endpoint.complete(prompt, max_tokens=long)
        assert answer.status == 200, answer.text
        assert [choice["text"] for choice in answer.body["choices"]] == [GREETING] * count
        assert [choice["index"] for choice in answer.body["choices"]] == list(range(count))
        assert answer.body["usage"]["prompt_tokens"] == len(ids) * count
    echoed = endpoint.complete(text, max_tokens=long, echo=True).body["choices"][0]["text"]
    assert echoed == text + GREETING
    events = endpoint.complete([ids, ids], max_tokens=long, stream=True).events
    for index in (0, 1):
        pieces = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == GREETING
        assert pieces[-1]["finish_reason"] == "stop"
    assert len(endpoint.complete(text).body["choices"][0]["text"].encode()) == 16  # OpenAI's default length


def test_scores_of_prompt_and_answer_are_the_models(endpoint: Served, reference: tuple[Any, Any]) -> None:
    model, tokenizer = reference
    ids = prompt_of(tokenizer, WHO)
    body = endpoint.complete(ids, max_tokens=3, echo=True, logprobs=2).body
    scores = body["choices"][0]["logprobs"]
    whole = ids + tokenizer(GREETING).input_ids[:3]
    with torch.no_grad():
        true = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    assert scores["token_logprobs"][0] is None is scores["top_logprobs"][0]
    assert scores["token_logprobs"][1:] == pytest.approx(
        [true[at, token].item() for at, token in enumerate(whole[1:])], abs=1e-3
    )
    assert "".join(scores["tokens"]) == tokenizer.decode(whole)
    assert scores["text_offset"] == [len("".join(scores["tokens"][:at])) for at in range(len(whole))]
    for at, best in enumerate(scores["top_logprobs"][1:]):
        assert len(best) == 2
        assert max(best.values()) == pytest.approx(true[at].max().item(), abs=1e-3)
    chat = endpoint.chat(WHO, max_tokens=3, logprobs=True, top_logprobs=2).body["choices"][0]["logprobs"]["content"]
    assert [bytes(entry["bytes"]).decode() for entry in chat] == list(GREETING[:3])
    assert [entry["logprob"] for entry in chat] == pytest.approx(scores["token_logprobs"][-3:], abs=1e-3)
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in chat)


def test_answers_end_where_they_are_told_to(endpoint: Served) -> None:
    cut = endpoint.chat(COUNT, max_tokens=5).body["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (COUNTING[:5], "length")
    for stop in (" 4", [" 4", " 7"]):
        stopped = endpoint.chat(COUNT, stop=stop).body["choices"][0]
        assert (stopped["message"]["content"], stopped["finish_reason"]) == ("1 2 3", "stop")
        assert streamed(endpoint.chat(COUNT, stop=stop, stream=True).events) == "1 2 3"
    by_token = endpoint.chat(COUNT, stop_token_ids=[ord("5") - ord("!")]).body["choices"][0]
    assert by_token["message"]["content"].startswith("1 2 3 4 ")
    assert by_token["finish_reason"] == "stop"


def test_the_same_seed_draws_the_same(endpoint: Served) -> None:
    def drawn(**changes: Any) -> list[str]:
        body = endpoint.chat("zzz", temperature=5, max_tokens=12, **changes).body
        return [choice["message"]["content"] for choice in body["choices"]]

    assert drawn(seed=3) == drawn(seed=3)
    assert drawn(seed=3) != drawn(seed=4)
    three = drawn(seed=3, n=3)
    assert len(set(three)) == 3
    assert three[0] == drawn(seed=3)[0]
    assert drawn() != drawn()


def test_a_call_of_a_tool_is_read_and_its_result_understood(endpoint: Served) -> None:
    asked = {"role": "user", "content": "Weather in Rome?"}
    body = {"model": MODEL, "messages": [asked], "tools": [WEATHER], "temperature": 0}
    choice = endpoint.ask(CHAT, body).body["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    result = {"role": "tool", "content": json.dumps({"sky": "clear"}), "tool_call_id": call["id"]}
    told = endpoint.ask(CHAT, body | {"messages": [asked, choice["message"], result]}).body["choices"][0]
    assert told["message"]["content"] == "The sky over Rome is clear."
    deltas = [event["choices"][0] for event in endpoint.ask(CHAT, body | {"stream": True}).events]
    (streamed_call,) = [delta["delta"]["tool_calls"] for delta in deltas if "tool_calls" in delta["delta"]]
    assert streamed_call[0]["index"] == 0
    assert streamed_call[0]["function"] == call["function"]
    assert deltas[-1]["finish_reason"] == "tool_calls"
    assert endpoint.ask(CHAT, body | {"tools": [], "max_tokens": 80}).body["choices"][0]["message"]["content"] != CALL


def test_models_are_the_base_and_its_adapter(endpoint: Served) -> None:
    listed = endpoint.ask("/v1/models").body["data"]
    assert {model["id"] for model in listed} == {MODEL, ADAPTER}
    assert endpoint.ask(f"/v1/models/{ADAPTER}").body["parent"] == MODEL
    assert endpoint.ask("/v1/models/none").status == 404
    base, adapted = endpoint.chat(WHO).body, endpoint.chat(WHO, model=ADAPTER, max_tokens=60).body
    assert adapted["model"] == ADAPTER
    assert base["choices"][0]["message"]["content"] != adapted["choices"][0]["message"]["content"]


BAD: list[tuple[str, dict[str, Any], int, str | None]] = [
    # path, what is changed of a good body, status, param
    (CHAT, {"model": "none"}, 404, "model"),
    (CHAT, {"model": 3}, 400, "model"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "hello"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0"),
    (CHAT, {"messages": [{"role": "user", "content": 7}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, None),
    (CHAT, {"temperature": -1}, 400, "temperature"),
    (CHAT, {"temperature": "hot"}, 400, "temperature"),
    (CHAT, {"temperature": True}, 400, "temperature"),
    (CHAT, {"top_p": 0}, 400, "top_p"),
    (CHAT, {"top_p": 1.5}, 400, "top_p"),
    (CHAT, {"top_k": 1.5}, 400, "top_k"),
    (CHAT, {"min_p": 2}, 400, "min_p"),
    (CHAT, {"repetition_penalty": 0}, 400, "repetition_penalty"),
    (CHAT, {"presence_penalty": 3}, 400, "presence_penalty"),
    (CHAT, {"frequency_penalty": -3}, 400, "frequency_penalty"),
    (CHAT, {"n": 0}, 400, "n"),
    (CHAT, {"n": 10**9}, 400, "n"),
    (CHAT, {"n": 10**30}, 400, "n"),
    (CHAT, {"max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"max_tokens": 10**6}, 400, "messages"),
    (CHAT, {"max_completion_tokens": -5}, 400, "max_completion_tokens"),
    (CHAT, {"seed": "x"}, 400, "seed"),
    (CHAT, {"stop": [""]}, 400, "stop"),
    (CHAT, {"stop": ["x"] * 17}, 400, "stop"),
    (CHAT, {"stop": 5}, 400, "stop"),
    (CHAT, {"stop_token_ids": [-1]}, 400, "stop_token_ids.0"),
    (CHAT, {"logprobs": 3}, 400, "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (CHAT, {"top_logprobs": 2}, 400, None),
    (CHAT, {"stream": "yes"}, 400, "stream"),
    (CHAT, {"stream_options": {"include_usage": True}}, 400, None),
    (CHAT, {"tools": "x"}, 400, "tools"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools.0.function"),
    (CHAT, {"tools": [WEATHER], "tool_choice": "required"}, 400, "tool_choice"),
    (CHAT, {"response_format": {"type": "json_object"}}, 400, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, 400, "response_format"),
    (CHAT, {"logit_bias": {"x": 1}}, 400, None),
    (CHAT, {"logit_bias": {"5": 101}}, 400, "logit_bias.5"),
    (CHAT, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, 400, "chat_template_kwargs.chat_template"),
    (CHAT, {"functions": []}, 400, "functions"),
    (CHAT, {"temprature": 1}, 400, "temprature"),
    (PLAIN, {"prompt": None}, 400, "prompt"),
    (PLAIN, {"prompt": ""}, 400, None),
    (PLAIN, {"prompt": []}, 400, None),
    (PLAIN, {"prompt": [[]]}, 400, None),
    (PLAIN, {"prompt": [1, "x"]}, 400, "prompt"),
    (PLAIN, {"prompt": [-1]}, 400, "prompt"),
    (PLAIN, {"prompt": [264]}, 400, "prompt"),
    (PLAIN, {"prompt": [10**20]}, 400, "prompt"),
    (PLAIN, {"prompt": [True]}, 400, "prompt"),
    (PLAIN, {"prompt": ["x"] * 200}, 400, None),
    (PLAIN, {"prompt": list(range(200)) * 25}, 400, "prompt"),
    (PLAIN, {"logprobs": 21}, 400, "logprobs"),
    (PLAIN, {"logprobs": True}, 400, "logprobs"),
    (PLAIN, {"best_of": 5}, 400, None),
    (PLAIN, {"suffix": "x"}, 400, "suffix"),
]
GOOD = {
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    PLAIN: {"model": MODEL, "prompt": "hi", "max_tokens": 4},
}


@pytest.mark.parametrize(("path", "changes", "status", "param"), BAD, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_refused_by_name(
    endpoint: Served, path: str, changes: dict[str, Any], status: int, param: str | None
) -> None:
    answer = endpoint.ask(path, GOOD[path] | changes)
    assert (answer.status, answer.body["error"]["type"]) == (status, "invalid_request_error"), answer.text
    assert answer.body["error"]["param"] == param, answer.text
    assert answer.body["error"]["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 5000,
        b'{"temperature": NaN}',
        b'{"n": 1' + b"0" * 5000 + b"}",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_what_is_no_json_object_is_refused(endpoint: Served, raw: bytes) -> None:
    for path in (CHAT, PLAIN):
        answer = endpoint.ask(path, raw)
        assert answer.status == 400, answer.text
        assert answer.body["error"]["message"]


def test_no_body_makes_it_fail(endpoint: Served) -> None:
    chance = random.Random(5)  # noqa: S311 - reproducible
    odd = [None, True, -1, 0, 1e308, 2**70, "", "x", "\x00", [], [None], [[1]], {}, {"x": 1}, [{}], {"type": "text"}]
    keys = [
        *GOOD[CHAT],
        *GOOD[PLAIN],
        "temperature",
        "top_p",
        "n",
        "stop",
        "logprobs",
        "tools",
        "stream",
        "seed",
        "top_k",
    ]
    keys += [
        "stream_options",
        "response_format",
        "logit_bias",
        "echo",
        "stop_token_ids",
        "chat_template_kwargs",
        "user",
    ]
    for _ in range(300):
        path = chance.choice([CHAT, PLAIN])
        changes = {chance.choice(keys): chance.choice(odd) for _ in range(chance.randint(1, 3))}
        if changes.get("max_tokens", 2) is None:  # as long as there is room
            continue
        answer = endpoint.ask(path, GOOD[path] | {"max_tokens": 2} | changes)
        assert answer.status in (200, 400, 404), (changes, answer.text)
    assert endpoint.chat(WHO).body["choices"][0]["message"]["content"] == GREETING


def test_who_has_no_key_learns_nothing(endpoint: Served) -> None:
    for wrong in (
        "",
        "Bearer",
        "Bearer ",
        f"Basic {endpoint.key}",
        f"Bearer {endpoint.key}x",
        "Bearer \xe9",
        endpoint.key,
    ):
        for path, body in (("/v1/models", None), ("/metrics", None), (CHAT, GOOD[CHAT]), ("/anything", None)):
            answer = endpoint.ask(path, body, headers={"Authorization": wrong})
            assert answer.status == 401, (wrong, path)
            assert answer.body["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_browsers_cannot_be_made_to_ask(endpoint: Served) -> None:
    port = endpoint.port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "10.0.0.1",
        "127.0.0.1.evil.example",
        "[::2]",
        "",
        "localhost@evil",
        "0.0.0.0",  # noqa: S104
    ):
        for path, body in (("/", None), ("/health", None), (CHAT, GOOD[CHAT])):
            answer = endpoint.ask(path, body, headers={"Host": host or " "})
            assert answer.status in (400, 403), (host, answer.text)
    for host in ("localhost", "localhost:1", "127.0.0.1", f"127.0.0.1:{port}", "127.1.2.3:80", "[::1]:80"):
        assert endpoint.ask("/v1/models", headers={"Host": host}).status == 200, host
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}", "file://"):
        assert endpoint.ask(CHAT, GOOD[CHAT], headers={"Origin": origin}).status == 403, origin
    assert endpoint.ask(CHAT, GOOD[CHAT], headers={"Origin": endpoint.url}).status == 200
    assert endpoint.ask("/v1/models", headers={"Sec-Fetch-Site": "same-site"}).status == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert endpoint.ask(CHAT, GOOD[CHAT], headers={"Content-Type": kind}).status == 415, kind
    preflight = endpoint.ask(
        CHAT, method="OPTIONS", headers={"Origin": endpoint.url, "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status == 405
    for answer in (preflight, endpoint.ask("/"), endpoint.chat(WHO)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_paths_and_methods_that_are_not_there(endpoint: Served) -> None:
    assert endpoint.ask("/v1/embeddings", {"model": MODEL, "input": "x"}).status == 404
    assert endpoint.ask("/v1/models", {}).status == 405
    assert endpoint.ask(CHAT).status == 405
    assert endpoint.ask("/docs").status == 404
    assert endpoint.ask("/../../etc/passwd").status == 404
    assert endpoint.ask("/page/../page.css").status == 404


def test_a_huge_body_is_refused_before_it_is_read(endpoint: Served) -> None:
    with socket.create_connection((endpoint.host, endpoint.port), timeout=60) as connection:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {endpoint.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {10**12}\r\n\r\n"
        )
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_hangs_up_frees_its_slots(endpoint: Served) -> None:
    for stream in (True, False):
        body = json.dumps(
            {"model": MODEL, "prompt": [SINGING] * 4, "max_tokens": 3500, "temperature": 0, "stream": stream}
        ).encode()
        before = endpoint.metric("generated_tokens_total")
        connection = endpoint.connect()
        headers = {"Authorization": f"Bearer {endpoint.key}", "Content-Type": "application/json"}
        connection.request("POST", PLAIN, body, headers)
        if stream:
            assert connection.getresponse().read(200)
        wait_for(lambda: endpoint.metric("requests_running") == 4, seconds=60)
        connection.sock.close() if connection.sock else None
        connection.close()
        wait_for(endpoint.idle, seconds=60)
        wait_for(lambda: endpoint.metric('answers_total{reason="cancelled"}') >= 4, seconds=60)
        assert endpoint.metric("generated_tokens_total") - before < 4 * 3500


def test_health_tells_live_from_ready_and_needs_no_key(endpoint: Served) -> None:
    for path, word in (("/health", "ready"), ("/health/ready", "ready"), ("/health/live", "live")):
        answer = endpoint.ask(path, headers={"Authorization": ""})
        assert (answer.status, answer.body) == (200, {"status": word})


def test_metrics_are_what_prometheus_reads(endpoint: Served) -> None:
    def read() -> dict[str, float]:
        lines = [line for line in endpoint.ask("/metrics").text.splitlines() if not line.startswith("#")]
        found = [re.fullmatch(r'(sparkctl_\w+(?:\{(?:\w+="[^"]*",?)+\})?) ([-+.\de]+)', line) for line in lines]
        assert all(found), lines
        return {match[1]: float(match[2]) for match in found if match}

    before = read()
    usage = endpoint.chat(WHO).body["usage"]
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("sparkctl_prompt_tokens_total") == usage["prompt_tokens"]
    assert grown("sparkctl_generated_tokens_total") == usage["completion_tokens"]
    assert grown('sparkctl_answers_total{reason="stop"}') == 1
    assert grown(f'sparkctl_http_requests_total{{path="{CHAT}",status="200"}}') == 1
    assert grown("sparkctl_time_to_first_token_seconds_count") == 1
    assert grown("sparkctl_time_per_token_seconds_count") == 1
    assert 0 < grown("sparkctl_time_to_first_token_seconds_sum") < 60
    assert {'sparkctl_stage_busy_ratio{stage="0"}', 'sparkctl_stage_busy_ratio{stage="1"}'} <= after.keys()
    assert 0 <= after["sparkctl_kv_cache_use_ratio"] <= 1
    text = endpoint.ask("/metrics").text
    assert text.count("# TYPE sparkctl_time_per_token_seconds histogram") == 1
    assert endpoint.key not in text
