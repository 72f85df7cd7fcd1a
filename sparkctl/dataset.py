"""`sparkctl dataset`: questions and answers from a Python package's own docstrings."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparkctl.options import Options, common

if TYPE_CHECKING:
    from launch.docstrings import Format, Harvest, Kind

LARGE = 200  # files: about a second's reading, from where a bar is worth its flicker


@click.command()
@click.argument("source")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE.jsonl", help="The file to write."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["qa", "completion"]),
    default="qa",
    show_default=True,
    help='qa: {"question", "answer"}. completion: {"text": "name: meaning"}, to train a base model.',
)
@click.option(
    "--kinds", metavar="KIND,...", help="Of meaning, signature and call, only these questions (qa). Default: all."
)
@click.option(
    "--max", "limit", type=click.IntRange(min=1), metavar="N", help="At most N, evenly spaced over the sorted names."
)
@click.option(
    "--max-answer",
    type=click.IntRange(min=1),
    default=400,
    show_default=True,
    metavar="CHARS",
    help="Meanings are cut to whole sentences within this; other answers longer than this are left out.",
)
@click.option("--force", is_flag=True, help="Replace FILE.jsonl if it is there.")
@common
def dataset(
    options: Options,
    *,
    source: str,
    output: Path,
    form: Format,
    kinds: str | None,
    limit: int | None,
    max_answer: int,
    force: bool,
) -> None:
    """Make question-and-answer pairs from the docstrings and signatures of SOURCE.

    SOURCE is a folder, a .py file, an installed package's or module's name, or `stdlib`: the running Python's standard
    library. It is read and never imported, so none of its code runs. Public objects only; test folders are left out.
    The same sources give the same file, byte for byte.
    """
    from launch import docstrings

    chosen_kinds = _kinds(kinds, form)
    docstrings.check_output(output, force=force)
    with _progress_bar(shown=sys.stderr.isatty() and not options.quiet and not options.json) as progress:
        harvest = docstrings.collect(source, progress=progress)
    available = docstrings.pairs(harvest, kinds=chosen_kinds, max_answer=max_answer)
    too_long = len(docstrings.pairs(harvest, kinds=chosen_kinds, max_answer=None)) - len(available)
    if not available:
        from cluster.errors import WrongInputError

        raise WrongInputError(f"{source}: no answer fits {max_answer} characters", "raise --max-answer")
    chosen = docstrings.pairs(harvest, kinds=chosen_kinds, max_answer=max_answer, limit=limit)
    docstrings.write(output, docstrings.lines(chosen, form), force=force)

    outcome = _Outcome(output, form, len(chosen), len(available), too_long, harvest)
    if options.json:
        click.echo(_document(outcome))
    options.say(_summary(outcome))


@dataclass(frozen=True)
class _Outcome:
    output: Path
    form: Format
    written: int
    available: int
    too_long: int
    harvest: Harvest


def _kinds(text: str | None, form: Format) -> tuple[Kind, ...]:
    from launch.docstrings import KINDS

    if form == "completion":
        if text is not None:
            raise click.UsageError("--kinds goes with --format qa: a completion is always the meaning")
        return ("meaning",)
    asked = [kind.strip() for kind in text.split(",")] if text is not None else list(KINDS)
    if unknown := [kind for kind in asked if kind not in KINDS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(KINDS)}", param_hint="--kinds")
    return tuple(kind for kind in KINDS if kind in asked)


@contextmanager
def _progress_bar(*, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:

        def advance(done: int, total: int) -> None:
            if total < LARGE:
                return
            if not bar.tasks:
                bar.add_task("reading", total=total)
            bar.update(bar.task_ids[0], completed=done)

        yield advance


def _document(made: _Outcome) -> str:
    return json.dumps(
        {
            "file": str(made.output),
            "format": made.form,
            "written": made.written,
            "available": made.available,
            "files": made.harvest.files,
            "skipped": {**asdict(made.harvest.skipped), "answer_too_long": made.too_long},
            "unread": [asdict(unread) for unread in made.harvest.unread],
        },
        ensure_ascii=False,
    )


def _summary(made: _Outcome) -> str:
    noun = "pair" if made.form == "qa" else "line"
    amount = _count(made.written, noun)
    if made.written < made.available:
        amount = f"{made.written:,} of {_count(made.available, noun)}, evenly spaced,"
    skipped = made.harvest.skipped
    parts = [
        (skipped.without_docstring, "without a docstring"),
        (skipped.too_short, "too short"),
        (skipped.uninformative, "uninformative"),
        (skipped.duplicate, "duplicate"),
        (made.too_long, "with too long an answer"),
        *((count, reason) for reason, count in sorted(Counter(u.reason for u in made.harvest.unread).items())),
    ]
    left_out = ", ".join(_count(count, reason) for count, reason in parts if count)
    return (
        f"wrote {amount} to {made.output} (from {_count(made.harvest.files, 'file')}"
        f"{'; skipped ' + left_out if left_out else ''})"
    )


def _count(number: int, what: str) -> str:
    is_noun = what.endswith(("pair", "line", "file", "folder", "duplicate"))
    return f"{number:,} {what}{'s' if is_noun and number != 1 else ''}"
