"""The programs that people have speak to the endpoint: openai's package, lm-eval, curl."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch
import transformers

from tests.launch.inference.server.parrot import COUNTING, GREETING, WEATHER
from tests.launch.inference.server.serving import ADAPTER, MODEL, Served

pytestmark = pytest.mark.timeout(600)

WHO = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def client(endpoint: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.key, max_retries=0, timeout=60)


def test_openai_chats_and_streams(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {MODEL, ADAPTER}
    answer = client.chat.completions.create(model=MODEL, messages=WHO, temperature=0)
    assert answer.choices[0].message.content == GREETING
    assert answer.usage is not None
    stream = client.chat.completions.create(
        model=MODEL, messages=WHO, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == GREETING
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_openai_completes_with_logprobs(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=WHO, temperature=0, logprobs=True, top_logprobs=3, max_tokens=4
    )
    assert chat.choices[0].logprobs is not None
    scores = chat.choices[0].logprobs.content
    assert scores is not None
    assert "".join(score.token for score in scores) == GREETING[:4]
    assert all(len(score.top_logprobs) == 3 and score.logprob <= 0 for score in scores)
    plain = client.completions.create(
        model=MODEL, prompt="<user>Count<end><assistant>", temperature=0, logprobs=1, max_tokens=5
    )
    assert plain.choices[0].text == COUNTING[:5]
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.tokens == list(COUNTING[:5])


def test_openai_calls_tools(client: openai.OpenAI) -> None:
    asked = [{"role": "user", "content": "Weather in Rome?"}]
    answer = client.chat.completions.create(model=MODEL, messages=asked, tools=[WEATHER], temperature=0)
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert json.loads(calls[0].function.arguments) == {"city": "Rome"}
    with client.chat.completions.stream(model=MODEL, messages=asked, tools=[WEATHER], temperature=0) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    streamed = final.choices[0].message.tool_calls
    assert streamed is not None
    assert streamed[0].function.name == "weather"
    result = {"role": "tool", "tool_call_id": calls[0].id, "content": json.dumps({"sky": "clear"})}
    told = client.chat.completions.create(
        model=MODEL, messages=[*asked, answer.choices[0].message, result], tools=[WEATHER], temperature=0
    )
    assert told.choices[0].message.content == "The sky over Rome is clear."


def test_openai_knows_every_error(client: openai.OpenAI, endpoint: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'none' here"):
        client.chat.completions.create(model="none", messages=WHO)
    with pytest.raises(openai.BadRequestError, match="temperature: must be greater than or equal to 0"):
        client.chat.completions.create(model=MODEL, messages=WHO, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="4096") as caught:
        client.completions.create(model=MODEL, prompt="x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


TASK = """
task: sayings
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
ROWS = [
    {"prompt": "<user>Count<end><assistant>", "choices": ["1 2 3", "3 2 1"], "label": 0},
    {"prompt": "<user>Count<end><assistant>", "choices": ["zzzzz", "1 2 3 4"], "label": 1},
    {"prompt": "<user>Who are you?<end><assistant>", "choices": ["Hello, I am", "Go away"], "label": 0},
    {"prompt": "<user>Who are you?<end><assistant>", "choices": ["Hello, I am", "Go away"], "label": 1},
]


def test_lm_eval_scores_a_task_as_the_model_itself_would(endpoint: Served, parrots: Path, tmp_path: Path) -> None:
    (tmp_path / "sayings.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = (
        f"model={MODEL},base_url={endpoint.url}/v1/completions,tokenizer={parrots / 'model'},"
        "tokenizer_backend=huggingface,num_concurrent=2,max_retries=1,max_length=1024"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", settings),
            *("--tasks", "sayings", "--include_path", str(tmp_path), "--batch_size", "2"),
            *("--output_path", str(tmp_path / "out"), "--log_samples"),
        ],
        env={**os.environ, "OPENAI_API_KEY": endpoint.key, "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert results["results"]["sayings"]["acc,none"] == pytest.approx(0.75)
    model = transformers.AutoModelForCausalLM.from_pretrained(parrots / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(parrots / "model")
    samples = [json.loads(line) for line in next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()]
    assert len(samples) == len(ROWS)
    for sample in samples:
        for choice, response in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            prompt, answer = tokenizer(sample["doc"]["prompt"]).input_ids, tokenizer(choice).input_ids
            with torch.no_grad():
                scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            true = math.fsum(scores[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer))
            assert float(response[0]) == pytest.approx(true, abs=1e-2)


def test_curl_asks_and_streams(endpoint: Served) -> None:
    body = {"model": MODEL, "messages": WHO, "temperature": 0}
    for extra in ({}, {"stream": True}):
        done = subprocess.run(
            [
                *("curl", "-sS", "-N", "--fail-with-body", f"{endpoint.url}/v1/chat/completions"),
                *("-H", f"Authorization: Bearer {endpoint.key}", "-H", "Content-Type: application/json"),
                *("-d", json.dumps(body | extra)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.rstrip().endswith("data: [DONE]") == bool(extra)
        assert extra or json.loads(done.stdout)["choices"][0]["message"]["content"] == GREETING
