"""`ask`: questions to a fine-tuned job or to an inference recipe, answered by the model split over the pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparkctl.options import Options, common
from sparkctl.words import harmless

if TYPE_CHECKING:
    from launch.handle import JobHandle, PairHandle
    from launch.inference.request import Request
    from launch.questions import Answer, Answers
    from launch.start import Prepared

# How many questions a server is asked at once.
AT_ONCE = 16


@click.command()
@click.argument("target", metavar="JOB|RECIPE")
@click.argument("questions", nargs=-1, required=True, metavar="TEXT...")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a key of the inference recipe; may be repeated.",
)
@click.option("--model", help="Of a served job with several models: which one to ask.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="The longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(0, 10), default=0.0, show_default=True, help="0 takes the likeliest words."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed draws the same answer."
)
@common
def ask(
    options: Options,
    target: str,
    questions: tuple[str, ...],
    overrides: tuple[str, ...],
    model: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> int:
    """Ask JOB (served, or a fine-tune) or RECIPE (kind: inference) one or more questions, answered side by side."""
    from cluster.errors import WrongInputError
    from launch.inference.request import Sampling
    from launch.questions import requests

    asked = requests(
        questions, max_tokens=max_tokens, sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed)
    )
    is_job = Path(target).suffix not in (".yaml", ".yml")
    if is_job and overrides:
        raise WrongInputError("--set goes with a recipe file, not with a job", f"sparkctl ask {target} 'your question'")
    with options.pair() as pair:
        served = pair.find(target) if is_job else None
        if served is not None and served.spec.recipe["kind"] == "inference":
            answers = _answer_served(options, pair, served, asked, model)
        elif model is not None:
            raise WrongInputError("--model goes with a served job", f"sparkctl ask {target} 'your question'")
        else:
            answers = answer(options, pair, _prepare(pair, target, served, overrides), asked)
    if options.json:
        rows = [
            {"question": a.question, "answer": a.text, "tokens": a.tokens, "finish_reason": a.finish_reason}
            for a in answers.of.values()
        ]
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
    return 0


def answer(
    options: Options,
    pair: PairHandle,
    prepared: Prepared,
    asked: tuple[Request, ...],
    *,
    show: bool = True,
) -> Answers:
    """Run the requests as a job of their own and return the answers; a single one is shown as it is written.

    The job is removed when it has answered: its questions are the user's own business.
    """
    from launch.follow import follow
    from launch.questions import Answers
    from sparkctl import jobs, run

    answers = Answers.to(asked)
    stream = show and not options.json and len(asked) == 1
    if show:
        _introduce(options, prepared)
    job = run.started(options, prepared, pair, asked, quiet=not show)
    state = None
    try:
        for update in follow(job, "answers.jsonl"):
            state = update.state
            for entry in update.entries:
                piece = answers.take(entry)
                if stream:
                    click.echo(harmless(piece), nl=False)
        if state is None or state.state != "succeeded":
            raise run.failure(job, state or job.state())
    except KeyboardInterrupt:
        state = jobs.end(job, now=True)
        raise
    finally:
        if state is not None and state.state in ("succeeded", "stopped"):
            jobs.wait_until_gone(job)
            job.remove()
    if stream:
        click.echo()
    elif show and not options.json:
        _print_all(list(answers.of.values()))
    return answers


def _answer_served(
    options: Options, pair: PairHandle, job: JobHandle, asked: tuple[Request, ...], model: str | None
) -> Answers:
    """Have a running server answer, all questions at once; a single answer is shown as it is written."""
    from concurrent.futures import ThreadPoolExecutor

    from launch.questions import Answers
    from sparkctl.reach import reach

    answers = Answers.to(asked)
    stream = not options.json and len(asked) == 1
    reached = reach(pair, job)
    name, client = reached.model(model), reached.client()

    def ask_one(request: Request) -> None:
        sampling = {**request.sampling.model_dump(exclude_defaults=True), "temperature": request.sampling.temperature}
        messages = [{"role": turn.role, "content": turn.content} for turn in request.turns]
        one = answers.of[request.id]
        for piece in client.chat(messages, model=name, max_tokens=request.max_tokens, **sampling):
            one.text += piece.text
            one.tokens = piece.tokens or one.tokens
            one.finish_reason = piece.finish_reason or one.finish_reason
            if stream:
                click.echo(harmless(piece.text), nl=False)

    if stream:
        ask_one(asked[0])
        click.echo()
        return answers
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(ask_one, asked))
    if not options.json:
        _print_all(list(answers.of.values()))
    return answers


def _prepare(pair: PairHandle, target: str, job: JobHandle | None, overrides: tuple[str, ...]) -> Prepared:
    from cluster.errors import WrongInputError
    from launch import questions, start
    from launch.recipe import InferenceRecipe

    inventory = pair.inventory
    if job is not None:
        return start.prepare(questions.recipe_for(job), inventory, pair, source=target)
    prepared = start.prepare_file(Path(target), overrides, inventory, pair)
    if not isinstance(prepared.recipe, InferenceRecipe):
        raise WrongInputError(
            f"{target}: kind: {prepared.recipe.kind} cannot be asked", "run it, then ask the job that it makes"
        )
    return prepared


def _introduce(options: Options, prepared: Prepared) -> None:
    from sparkctl import show

    if options.json or options.quiet:
        return
    click.secho(show.banner(prepared.inventory, ranks=len(prepared.plan.ranks)), dim=True, err=True)
    held = "; ".join(f"rank {rank.rank}: {rank.cut}" for rank in prepared.plan.ranks)
    click.secho(f"{prepared.card.folder.name}, {held}", dim=True, err=True)


def _print_all(answers: list[Answer]) -> None:
    for index, one in enumerate(answers):
        click.echo(("\n" if index else "") + click.style(one.question, bold=True))
        click.echo(harmless(one.text))
