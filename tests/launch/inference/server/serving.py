"""A real endpoint: a job on the embedded pair that serves the parrot and an adapter of it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.inference.endpoint import Endpoint, key_of
from launch.job import JobFolder
from tests.commandline import CommandLine, wait_for
from tests.launch.inference.server import parrot

MODEL, ADAPTER = "parrot", "adapter"
LENGTH = 4096
RECIPE = {
    "kind": "inference",
    "name": MODEL,
    "base_model": "./model",
    "adapter_path": "./adapter",
    "max_model_len": LENGTH,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "port": 0,
}


@dataclass(frozen=True)
class Answer:
    """An HTTP response, read whole."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> dict[str, Any]:
        """Its JSON."""
        found = json.loads(self.content)
        assert isinstance(found, dict)
        return found

    @property
    def text(self) -> str:
        """It as text."""
        return self.content.decode()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a stream, which must have come to its end."""
        *blocks, done, rest = self.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(block.removeprefix("data: ")) for block in blocks]


@dataclass(frozen=True)
class Served:
    """A job that answers."""

    commands: CommandLine
    job: JobFolder
    host: str
    port: int
    key: str

    @property
    def url(self) -> str:
        """Where its pages and routes begin."""
        return f"http://{self.host}:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        """A connection of one's own."""
        return http.client.HTTPConnection(self.host, self.port, timeout=60)

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """One request, with the key and a JSON body where there is one; `headers` replace ours, or leave out where empty."""
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", **(headers or {})}
        connection = self.connect()
        try:
            connection.request(
                method or ("GET" if body is None else "POST"), path, raw, {name: v for name, v in sent.items() if v}
            )
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def chat(self, text: str, **changes: Any) -> Answer:
        """Ask one question, greedily."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0}
        return self.ask("/v1/chat/completions", body | changes)

    def complete(self, prompt: Any, **changes: Any) -> Answer:
        """Have a text gone on with, greedily."""
        return self.ask("/v1/completions", {"model": MODEL, "prompt": prompt, "temperature": 0} | changes)

    def metric(self, name: str) -> float:
        """One figure of /metrics, summed over its labels."""
        text = self.ask("/metrics").text
        assert f"# TYPE sparkctl_{name.partition('{')[0]} " in text, name
        lines = [line for line in text.splitlines() if line.startswith(f"sparkctl_{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self.metric("requests_running") == 0 == self.metric("requests_waiting")


@contextmanager
def serving(folder: Path, **changes: Any) -> Iterator[Served]:
    """Serve on two ranks while the block runs."""
    commands = CommandLine(folder)
    (folder / "serve.yaml").write_text(json.dumps(RECIPE | changes))
    try:
        job = commands.detach("serve.yaml")
        wait_for(lambda: job.state().state == "ready" or job.state().ended, seconds=400)
        assert job.state().state == "ready", job.state()
        yield served(commands, job)
    finally:
        commands.end_all()


def served(commands: CommandLine, job: JobFolder) -> Served:
    """A job that is ready."""
    endpoint = Endpoint.read(job.path)
    assert endpoint is not None
    return Served(commands, job, endpoint.host, endpoint.port, key_of(job.key()))


def equip(folder: Path) -> Path:
    """Make the model and the adapter."""
    parrot.make(folder / "model")
    parrot.make_adapter(folder / "model", folder / "adapter")
    return folder
