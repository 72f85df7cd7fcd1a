"""The group of all verbs. Each is imported when it is called, so that `sparkctl --help` loads nothing but click."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any

import click

from cluster.errors import SparkctlError
from sparkctl import __version__

# verb: (module, what it does). The order is that of the help.
VERBS = {
    "up": ("sparkctl.up", "Make two nodes a verified pair; shows everything first."),
    "down": ("sparkctl.up", "Undo it, byte for byte."),
    "status": ("sparkctl.status", "Both nodes and the link, at a glance."),
    "doctor": ("sparkctl.doctor", "What is wrong with the nodes and the link, and what to do."),
    "plan": ("sparkctl.run", "Who holds what: how a recipe's model is laid out over the pair."),
    "run": ("sparkctl.run", "Plan, start and follow a recipe; Ctrl-C detaches."),
    "jobs": ("sparkctl.jobs", "List the jobs and their states."),
    "logs": ("sparkctl.jobs", "What the ranks of a job printed."),
    "stop": ("sparkctl.jobs", "End a job on all its nodes."),
    "resume": ("sparkctl.resume", "Go on with a job that was stopped or has failed."),
    "ask": ("sparkctl.ask", "Ask a served or a fine-tuned job, or an inference recipe, one or more questions."),
    "chat": ("sparkctl.chat", "A conversation with a served model, or a fine-tuned one, on the terminal."),
    "tunnel": ("sparkctl.tunnel", "A served model, for programs and a browser on this machine."),
    "bench": ("sparkctl.bench", "Measure the link, or a served model under load."),
    "dataset": ("sparkctl.dataset", "Question-and-answer pairs from any Python package or source folder."),
    "export": ("sparkctl.export", "A recipe as a script for Slurm or torchrun."),
    "quantize": ("sparkctl.quantize", "An NF4 copy of a model, experts too: a quarter of its size."),
    "merge": ("sparkctl.merge", "A fine-tuned job's adapter, added into its model."),
    "recipes": ("sparkctl.recipes", "The ready recipes; their JSON Schema for editors."),
    "clean": ("sparkctl.clean", "List and remove what lies on the nodes and nothing refers to."),
    "demo": ("sparkctl.demo", "Rehearse all of it in four minutes: train, fine-tune and ask, on two local ranks."),
}
# What agents, torchrun and other machines' command lines call; not for people.
HIDDEN = dict.fromkeys(("agent", "worker", "orders", "fetch", "board"), "sparkctl.inner")


class Verbs(click.Group):
    """Knows its verbs by name and line; imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs that people use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module and take the command of its name."""
        module = VERBS[cmd_name][0] if cmd_name in VERBS else HIDDEN.get(cmd_name)
        if module is None:
            return None
        command = getattr(importlib.import_module(module), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but an unknown verb is answered with the nearest one."""
        if args and args[0] not in VERBS and args[0] not in HIDDEN and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, n=1)
            raise click.UsageError(f"no such verb: {args[0]}" + (f"; did you mean {near[0]}?" if near else ""), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs with their lines, from the table above."""
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sparkctl")
def cli() -> None:
    """Two NVIDIA DGX Sparks on one cable, used as one machine.

    Exit status: 0 done; 1 it failed; 2 wrong usage or a wrong input file; 3 refused.
    """


def main(argv: list[str] | None = None) -> Any:
    """Run the command line; what goes wrong is told in two lines on standard error, and by the exit status."""
    try:
        status = cli.main(args=argv, prog_name="sparkctl", standalone_mode=False)
    except SparkctlError as error:
        _complain(error.message, error.fix)
        sys.exit(error.status)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "sparkctl"
        _complain(error.format_message(), f"{path} --help")
        sys.exit(2)
    except click.ClickException as error:
        _complain(error.format_message(), "")
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted", "")
        sys.exit(130)
    except Exception as error:
        if "-v" in (argv or sys.argv) or "--verbose" in (argv or sys.argv):
            traceback.print_exc()
        _complain(
            f"unexpected {type(error).__name__}: {error}",
            "this is a fault in sparkctl: run again with -v and report what it prints",
        )
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


def _complain(message: str, fix: str) -> None:
    click.echo(f"{click.style('error', fg='red', bold=True)}: {message}", err=True)
    if fix:
        click.echo(f"  {click.style('try', fg='cyan')}: {fix}", err=True)
