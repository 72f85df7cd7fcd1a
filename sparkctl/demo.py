"""`demo`: the main job from nothing to an answer, on two local ranks, in about four minutes and without any download."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparkctl import __version__
from sparkctl.options import Options, common

if TYPE_CHECKING:
    from cluster.inventory import Inventory
    from launch.job import JobFolder
    from launch.questions import Answer

PAIRS = 500
LONGEST_ANSWER = 60  # characters
QUESTIONS = 3
# A loss above this means that the model has not learned its answers.
LOSS_BAR = 2.0


@click.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where data, models and recipes go. [default: $SPARKCTL_HOME/demo]",
)
@common
def demo(options: Options, folder: Path | None) -> int:
    """Train a small base model, fine-tune it on questions about Python, and ask it, all split over the embedded pair."""
    from cluster.inventory import EMBEDDED
    from launch import job
    from sparkctl import show

    began = time.monotonic()
    folder = (folder or job.home() / "demo").absolute()
    options.say(show.banner(EMBEDDED))
    with _step(options, 1, f"{PAIRS} questions from the docstrings of this Python's standard library"):
        rows = _data(folder)
    with _step(options, 2, "a small base model with random weights, and its tokenizer"):
        _base(folder)
    options.say(f"[3/5] full training of the base model on two ranks: {folder / 'demo-base.yaml'}")
    trained = _train(options, folder, "demo-base.yaml", EMBEDDED)
    shutil.rmtree(folder / "trained", ignore_errors=True)
    shutil.copytree(trained.model, folder / "trained")
    options.say(f"[4/5] LoRA fine-tune on two ranks: {folder / 'finetune-tiny.yaml'}")
    tuned = _train(options, folder, "finetune-tiny.yaml", EMBEDDED)
    options.say(f"[5/5] the tuned model, split over both ranks again, answers {QUESTIONS} of the questions")
    asked = [rows[len(rows) * part // (QUESTIONS + 1)] for part in range(1, QUESTIONS + 1)]
    answers = _ask(options, tuned, EMBEDDED, [row["question"] for row in asked])
    return _report(options, tuned, asked, answers, time.monotonic() - began)


@contextlib.contextmanager
def _step(options: Options, number: int, what: str) -> Iterator[None]:
    began = time.monotonic()
    options.say(f"[{number}/5] {what}")
    yield
    options.say(f"      {time.monotonic() - began:.1f} s")


def _data(folder: Path) -> list[dict[str, str]]:
    """Write the two datasets; returns the question-and-answer rows."""
    from launch import docstrings

    folder.mkdir(parents=True, exist_ok=True)
    harvest = docstrings.collect("stdlib")
    pairs = docstrings.pairs(harvest, kinds=("meaning",), max_answer=LONGEST_ANSWER, limit=PAIRS)
    docstrings.write(folder / "lines.jsonl", docstrings.lines(pairs, "completion"), force=True)
    rows = docstrings.lines(pairs, "qa")
    docstrings.write(folder / "qa.jsonl", rows, force=True)
    return [json.loads(row) for row in rows]


def _base(folder: Path) -> None:
    """Make the base model, and put the recipes beside it."""
    from sparkctl.recipes import folder as ready

    with _quietly():
        from launch.finetune import tiny

        texts = [json.loads(line)["text"] for line in (folder / "lines.jsonl").read_text(encoding="utf-8").splitlines()]
        tiny.make(folder / "base", texts, vocabulary=2048, hidden=128, layers=4, positions=128, seed=0)
    for name in ("demo-base.yaml", "finetune-tiny.yaml"):
        shutil.copyfile(ready() / name, folder / name)


def _train(options: Options, folder: Path, recipe: str, inventory: Inventory) -> JobFolder:
    from cluster.errors import FailedError
    from launch import start
    from launch.handle import PairHandle
    from launch.job import JobFolder
    from sparkctl import run

    prepared = start.prepare_file(folder / recipe, (), inventory)
    with PairHandle(inventory) as pair:
        job = start.start(prepared, pair, version=__version__)
        state = run.follow_training(options, job)
        if state is None:
            raise click.Abort
        if state.state != "succeeded":
            raise (
                run.failure(job, state)
                if state.state == "failed"
                else FailedError(f"job {job.id} was stopped", "sparkctl demo")
            )
    return JobFolder(Path(job.folder))


def _ask(options: Options, tuned: JobFolder, inventory: Inventory, questions: list[str]) -> list[Answer]:
    from launch import questions as asking
    from launch import start
    from launch.handle import PairHandle
    from launch.inference.request import Sampling
    from sparkctl import ask

    asked = asking.requests(questions, max_tokens=64, sampling=Sampling())
    with PairHandle(inventory) as pair:
        prepared = start.prepare(asking.recipe_for(pair.find(tuned.id)), inventory, source=tuned.id)
        return list(ask.answer(options, pair, prepared, asked, show=False).of.values())


def _report(
    options: Options, tuned: JobFolder, asked: list[dict[str, str]], answers: list[Answer], seconds: float
) -> int:
    from cluster.errors import FailedError

    history: list[dict[str, Any]] = [
        json.loads(line) for line in tuned.metrics.read_text(encoding="utf-8").splitlines()
    ]
    before, after = history[0]["loss"], history[-1]["loss"]
    if options.json:
        rows = [{**row, "model": answer.text} for row, answer in zip(asked, answers, strict=True)]
        click.echo(
            json.dumps({"job": tuned.id, "loss": [before, after], "seconds": seconds, "answers": rows}, indent=1)
        )
    elif not options.quiet:
        from rich.table import Table

        from sparkctl.show import print_table

        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for name in ("question", "the model answers", "the docstring says"):
            table.add_column(name, overflow="fold")
        for row, answer in zip(asked, answers, strict=True):
            table.add_row(row["question"], answer.text, row["answer"])
        click.echo()
        print_table(table)
        click.echo(f"\nloss         {before:.2f} before, {after:.2f} after, in {seconds:.0f} s")
        click.echo(f"adapter      {tuned.adapter}")
        click.echo(f"TensorBoard  {tuned.tensorboard}")
        click.echo(f'next         sparkctl ask {tuned.id} "{asked[0]["question"]}"')
    if after > LOSS_BAR:
        raise FailedError(f"the last loss is {after:.2f}, above {LOSS_BAR:g}: the model has not learned", "report this")
    return 0


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep libraries' chatter at import and saving (progress bars, advice on other hardware) off the user's screen."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
    with Path(os.devnull).open("wb") as nowhere:
        try:
            for descriptor, _ in saved:
                os.dup2(nowhere.fileno(), descriptor)
            yield
        finally:
            for descriptor, copy in saved:
                os.dup2(copy, descriptor)
                os.close(copy)
