"""Every command that README.md and docs/ show is run here, in their order, and so is `make demo`."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import models

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass
class Reader:
    """Someone who follows a page: a folder with a model and the page's recipe, and a home for jobs."""

    folder: Path
    kind: str = "finetune"  # of the job that JOB stands for
    words: dict[str, str] = field(default_factory=dict)  # what a tunnel has told: where a page says 8000 and KEY
    tunnels: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, command: str, *, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """Run one line of a page; placeholders stand for what the lines before it made."""
        argv = [self._real(word) for word in shlex.split(command, comments=True)]
        if argv[:2] == ["sparkctl", "tunnel"]:
            return self._open(argv)
        output = None
        if ">" in argv:
            output = self.folder / argv[argv.index(">") + 1]
            argv = argv[: argv.index(">")]
        done = subprocess.run(
            argv, cwd=self.folder, env=self._environment(), capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        if output is not None:
            output.write_text(done.stdout)
        return done

    def _open(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        """A tunnel, open until the reader has finished, on a port that is free here."""
        port = argv.index("--port")
        process = subprocess.Popen(
            [*argv[:port], *argv[port + 2 :], "--json"],
            cwd=self.folder,
            env=self._environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        self.tunnels.append(process)
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        self.words = {"http://127.0.0.1:8000/v1": told["base_url"], "KEY": told["api_key"]}
        return subprocess.CompletedProcess(argv, 0, "", "")

    def close(self) -> None:
        """End what still runs."""
        for process in self.tunnels:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        for job in json.loads(self.run("sparkctl jobs --json").stdout):
            self.run(f"sparkctl stop {job['id']} -q")

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "SPARKCTL_HOME": str(self.folder / "home"), "PATH": f"{BIN}:{os.environ['PATH']}"}

    def _real(self, word: str) -> str:
        if word in ("JOB", "JOB_FOLDER"):
            jobs = json.loads(self.run("sparkctl jobs --json").stdout)
            serves = self.kind == "inference"  # such a job is waited for
            first = next(
                job["id"] for job in jobs if job["kind"] == self.kind and (serves or job["state"] == "succeeded")
            )
            return first if word == "JOB" else str(self.folder / "home" / "jobs" / first)
        for told, real in self.words.items():
            word = word.replace(told, real)
        return word.removeprefix(".venv/bin/")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("reader")
    models.make(folder / "my-model")
    recipe = re.search(r"```yaml\n(kind: .*?)```", PAGES[0].read_text(), re.DOTALL)
    assert recipe is not None
    (folder / "recipe.yaml").write_text(recipe[1])
    command = re.search(r"```yaml\n(kind: .*?)```", (ROOT / "docs" / "commands.md").read_text(), re.DOTALL)
    assert command is not None
    (folder / "command.yaml").write_text(command[1])
    (folder / "src").mkdir()
    (folder / "src" / "own.py").write_text(
        '"""Own code of the reader."""\n\ndef twice(x):\n    """Return x two times over."""\n'
    )
    reader = Reader(folder)
    reader.run("sparkctl dataset json -o pairs.jsonl -q")
    yield reader
    reader.close()


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("make ")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_page_works(page: Path, reader: Reader) -> None:
    lines = commands(page)
    assert lines
    reader.kind = "inference" if page.name == "serving.md" else "finetune"
    if reader.kind == "inference":
        recipe = re.search(r"```yaml\n(kind: .*?)```", page.read_text(), re.DOTALL)
        assert recipe is not None
        (reader.folder / "serve.yaml").write_text(recipe[1])
    for line in lines:
        if " -o pairs.jsonl" in line:
            (reader.folder / "pairs.jsonl").unlink(missing_ok=True)
        reader.run(line)


@pytest.mark.timeout(600)
def test_make_demo_teaches_a_model_its_answers(tmp_path: Path) -> None:
    environment = {**os.environ, "SPARKCTL_HOME": str(tmp_path / "home")}
    del environment["OMP_NUM_THREADS"]
    done = subprocess.run(
        ["make", "demo"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "embedded pair" in done.stdout
    loss = re.search(r"loss +([\d.]+) before, ([\d.]+) after", done.stdout)
    assert loss is not None
    assert float(loss[2]) <= 2.0 < float(loss[1])
    for shown in ("adapter  ", "TensorBoard  ", "next  ", "the docstring says"):
        assert shown in done.stdout
    adapter = re.search(r"adapter +(\S+)", done.stdout)
    assert adapter is not None
    assert (Path(adapter[1]) / "adapter_model.safetensors").is_file()


def test_the_map_of_the_rooms_names_every_module() -> None:
    text = PAGES[0].read_text()
    modules = [
        path.relative_to(ROOT)
        for room in ("sparkctl", "cluster", "launch")
        for path in (ROOT / room).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    ]
    missing = [str(module) for module in modules if module.name not in text]
    assert not missing
