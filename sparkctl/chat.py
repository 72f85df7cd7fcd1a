"""`chat`: a conversation with a served model on the terminal."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from sparkctl.options import Options, common
from sparkctl.words import harmless

_HELP = "/new starts afresh, Ctrl-C stops an answer, Ctrl-D ends."


@click.command()
@click.argument("job")
@click.option("--model", help="One of the job's models; by default the base model.")
@click.option("--system", help="What the model is told first.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="The longest answer; by default as long as there is room."
)
@click.option(
    "--temperature", type=click.FloatRange(0, 10), help="0 takes the likeliest words; by default the model's own."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", type=click.IntRange(min=0), help="The same seed draws the same answers.")
@common
def chat(
    options: Options,
    job: str,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
) -> None:
    """Talk to JOB: served, or a fine-tune that is served meanwhile. A line is a question; Ctrl-C stops an answer, Ctrl-D ends.

    Where input is no terminal, each of its lines is asked in turn.
    """
    from sparkctl.reach import talking

    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    with talking(options, job) as reached:
        name = reached.model(model)
        talk = _Talk(options, reached.client(), name, system, sampling)
        if sys.stdin.isatty() and not options.quiet and not options.json:
            click.secho(f"{name} (job {reached.job.id}). {_HELP}", dim=True, err=True)
        talk.go_on()
    if options.json:
        click.echo(json.dumps(talk.turns, indent=1, ensure_ascii=False))


class _Talk:
    """The conversation so far."""

    def __init__(self, options: Options, client: Any, model: str, system: str | None, sampling: dict[str, Any]) -> None:
        self._options, self._client, self._model, self._sampling = options, client, model, sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = list(self._system)

    def go_on(self) -> None:
        """Take questions until there are no more."""
        while (question := self._next()) is not None:
            if question == "/new":
                self.turns = list(self._system)
            elif question:
                self._answer(question)

    def _next(self) -> str | None:
        if not sys.stdin.isatty():
            line = sys.stdin.readline()
            return line.strip() if line else None
        import readline  # noqa: F401 - lends `input` its editing and history

        try:
            return input("> ").strip()
        except EOFError:
            click.echo(err=True)
            return None

    def _answer(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})
        said = ""
        pieces = self._client.chat(self.turns, model=self._model, **self._sampling)
        try:
            for piece in pieces:
                said += piece.text
                if not self._options.json:
                    click.secho(harmless(piece.thought), dim=True, nl=False)
                    click.echo(harmless(piece.text), nl=False)
        except KeyboardInterrupt:
            pieces.close()  # closes the connection, by which the server knows
            click.secho(" (stopped)", dim=True, nl=False, err=True)
        if not self._options.json:
            click.echo()
        self.turns.append({"role": "assistant", "content": said})
