"""`up`, `down`: make the pair, undo it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparkctl.options import Options, common

if TYPE_CHECKING:
    from cluster.inventory import Inventory
    from cluster.pairing import Paired, Proposal
    from cluster.survey import Unfinished
    from cluster.transaction import Outcome
    from cluster.transport.hostkeys import UnknownHostKeyError
    from cluster.transport.sudo import Sudo


@dataclass(frozen=True)
class Asking:
    """What a person on the terminal, or the command's options, answer to `up`."""

    options: Options
    dry_run: bool
    yes: bool
    accept_new_host_keys: bool

    def accept(self, unknown: UnknownHostKeyError) -> bool:
        """Ask about a host key that was never seen, if there is somebody to ask."""
        if self.accept_new_host_keys:
            click.echo(f"{unknown.node}: new host key accepted: {unknown.key}", err=True)
            return True
        if not on_terminal():
            return False
        click.echo(f"{unknown.message}\n  {unknown.fix}", err=True)
        return click.confirm("Is this key the node's?", err=True)

    def mend(self, left: Sequence[Unfinished]) -> bool:
        """Undo what died runs have left; a dry run only says so."""
        for one in left:
            what = "would first be undone" if self.dry_run else "is undone first"
            self.options.say(f"{one.node}: what the run of {one.run.by} at {one.run.since} left unfinished {what}")
        if self.dry_run:
            return False
        return self._agreed("Undo it?")

    def approve(self, proposal: Proposal) -> bool:
        """Show what would be done, then ask."""
        self.options.say(shown(proposal))
        if self.dry_run:
            if self.options.json:
                nodes = {
                    site.node.name: [plan.describe() for plan in plans if not plan.done]
                    for site, plans in zip(proposal.survey.sites, proposal.planned, strict=True)
                }
                click.echo(json.dumps({"changes": nodes}, indent=1))
            return False
        return proposal.done or self._agreed("Do this?")

    def tell(self, node: str, said: str) -> None:
        """Progress, a line each."""
        self.options.say(f"{click.style(node or 'pair', bold=True)}: {said}")

    def _agreed(self, question: str) -> bool:
        from cluster.errors import WrongInputError

        if self.yes:
            return True
        if not on_terminal():
            raise WrongInputError(
                "without a terminal `up` needs --yes to change anything",
                "`sparkctl up --dry-run` shows what it would do",
            )
        if not click.confirm(question, err=True):
            raise click.Abort
        return True


@click.command()
@click.option("--dry-run", is_flag=True, help="Show what would be changed, and change nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")
@click.option("--accept-new-host-keys", is_flag=True, help="Trust host keys that were never seen before.")
@click.option("--force", is_flag=True, help="Measure the link again, even if nothing was changed.")
@click.option("--discover", is_flag=True, help="Look for two Sparks by mDNS, and write the inventory.")
@click.option("--wheelhouse", metavar="DIR", help="Install from this folder of wheels, there on both nodes.")
@common
def up(
    options: Options,
    dry_run: bool,
    yes: bool,
    accept_new_host_keys: bool,
    force: bool,
    discover: bool,
    wheelhouse: str | None,
) -> int:
    """Make the two nodes a pair: addresses and MTU of the link, keys, code, Python environment; verified.

    Shows everything first. What fails half-way is undone on both nodes. Run again, it changes nothing.
    """
    from cluster import pairing, transport
    from cluster.errors import RefusedError, WrongInputError

    if wheelhouse is not None and not wheelhouse.startswith("/"):
        raise WrongInputError(f"--wheelhouse {wheelhouse}: not an absolute path", "name a folder that is on both nodes")
    asking = Asking(options, dry_run, yes, accept_new_host_keys)
    if discover:
        return _discover(options, asking)
    inventory = options.inventory()
    if inventory.embedded:
        return _embedded(options, "nothing to do")
    transports = [transport.to(node) for node in inventory.nodes]
    try:
        paired = pairing.up(
            inventory,
            transports,
            asking,
            sudo=asking_sudo(),
            wheelhouse=wheelhouse,
            remeasure=force,
        )
    finally:
        for one in transports:
            one.close()
    if paired is None:
        return 0
    if options.json:
        click.echo(json.dumps({"changed": paired.changed, "pair": paired.record.model_dump(mode="json")}, indent=1))
    options.say(ended(paired))
    if paired.record.link.verdict == "below bar":
        raise RefusedError(paired.record.link.evidence, paired.record.link.fix)
    return 0


def _discover(options: Options, asking: Asking) -> int:
    """List what announces itself, have two chosen, and write the inventory of what turned out to be Sparks."""
    from cluster import discover, transport
    from cluster.errors import FailedError, WrongInputError
    from cluster.files import write_atomically
    from cluster.transport.local import LocalTransport

    path = options.inventory_path or Path("inventory.yaml")
    if not on_terminal():
        raise WrongInputError("--discover asks which nodes to take, and there is no terminal", f"write {path} by hand")
    if path.exists():
        raise WrongInputError(f"{path}: is there already", "-i FILE names another one to write")
    listed = discover.announced(LocalTransport("this machine"))
    if len(listed) < 2:
        raise FailedError(
            f"{len(listed)} SSH server{'s' * (len(listed) != 1)} announced by mDNS, and a pair takes two",
            f"are both boxes on this network? else write {path} by hand",
        )
    for number, one in enumerate(listed, 1):
        click.echo(f"{number:>3}  {one.host}  {one.address} port {one.port}", err=True)
    numbers = [click.prompt(f"Number of {which}", type=click.IntRange(1, len(listed)), err=True) for which in _ROLES]
    if numbers[0] == numbers[1]:
        raise WrongInputError("one node twice makes no pair", "choose two")
    user = click.prompt("User to log in as, on both", default=os.environ.get("USER", ""), err=True)
    nodes = [discover.node_of(listed[number - 1], user or None) for number in numbers]
    transports = [transport.to(node) for node in nodes]
    try:
        found = discover.sparks(nodes, transports, asking.accept)
    finally:
        for link in transports:
            link.close()
    text = discover.inventory_text(found)
    click.echo(text, err=True)
    if not asking.dry_run and click.confirm(f"Write this to {path}?", err=True):
        write_atomically(path, text.encode(), mode=0o644)
        options.say(f"{path}: written; `sparkctl up -i {path}` makes the pair")
    return 0


_ROLES = ("the head (rank 0)", "the peer")


@click.command()
@click.option("--purge", is_flag=True, help="Remove $SPARKCTL_HOME on the nodes too, with all jobs and their results.")
@click.option("--force", is_flag=True, help="Put back also what somebody else has changed since.")
@common
def down(options: Options, purge: bool, force: bool) -> int:
    """Undo all that `up` has changed on the nodes; jobs and their results stay."""
    from cluster import pairing, transport

    inventory = options.inventory()
    if inventory.embedded:
        return _embedded(options, "nothing to undo")
    transports = [transport.to(node) for node in inventory.nodes]
    try:
        outcomes = pairing.down(
            inventory,
            transports,
            Asking(options, dry_run=False, yes=True, accept_new_host_keys=False),
            sudo=asking_sudo(),
            force=force,
            purge=purge,
        )
    finally:
        for one in transports:
            one.close()
    if options.json:
        click.echo(json.dumps([_outcome(one) for one in outcomes], indent=1))
    return _told(options, inventory, outcomes)


def _embedded(options: Options, what: str) -> int:
    if options.json:
        click.echo(json.dumps({"embedded": True, "changed": False}))
    options.say(f"embedded pair: {what}, its two ranks run on this machine")
    return 0


def on_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def asking_sudo() -> Sudo:
    """Root on the nodes: without a password, or with one that is asked for on the terminal."""
    from cluster.transport.sudo import Sudo

    def ask(node: str) -> str | None:
        import getpass

        return getpass.getpass(f"password for sudo on {node} (and the other node): ") or None

    return Sudo(ask if on_terminal() else None)


def shown(proposal: Proposal) -> str:
    """What `up` would do, per host, like a diff."""
    from cluster.finding import Level
    from cluster.yamlcore import printable

    lines = []
    for rail in proposal.survey.plan.rails:
        ends = " <-> ".join(f"{end.node} {end.interface} {end.address}" for end in rail.ends)
        lines.append(f"rail {rail.index}: {ends}, MTU {rail.mtu}")
    for finding in proposal.survey.plan.findings:
        if finding.level is not Level.OK or not proposal.done:
            fix = f" ({finding.fix})" if finding.fix else ""
            where = f"{finding.node}: " if finding.node else ""
            lines.append(f"{finding.level}: {where}{printable(finding.evidence)}{fix}")
    for site, plans in zip(proposal.survey.sites, proposal.planned, strict=True):
        wanted = [plan for plan in plans if not plan.done]
        count = f"{len(wanted)} change{'s' * (len(wanted) != 1)}" if wanted else "nothing to change"
        lines.append(click.style(f"{site.node.name}: {count}", bold=True))
        for plan in wanted:
            first, *rest = plan.describe().splitlines()
            lines += [f"  {first}", *(f"      {_coloured(printable(line))}" for line in rest)]
    return "\n".join(lines)


def _coloured(line: str) -> str:
    colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
    return click.style(line, fg=colour) if colour else line


def ended(paired: Paired) -> str:
    """The pair, in a line."""
    link = paired.record.link
    what = "paired" if paired.changed else "paired already, nothing changed"
    speed = f"{link.gbps:.3g} Gbit/s, {link.verdict}" if link.gbps is not None else f"throughput {link.verdict}"
    return f"{' and '.join(node.name for node in paired.record.nodes)}: {what}; addresses and full-size packets ok; {speed}"


def _outcome(outcome: Outcome) -> dict[str, object]:
    return {
        "node": outcome.node,
        "undone": list(outcome.undone),
        "left": [{"change": one.title, "reason": one.reason, "diff": list(one.diff)} for one in outcome.left],
        "failed": [{"change": one.title, "reason": one.reason} for one in outcome.failed],
        "error": outcome.error.message if outcome.error else None,
    }


def _told(options: Options, inventory: Inventory, outcomes: Sequence[Outcome]) -> int:
    """Say what became of it; exit status 1 if anything is not undone."""
    from cluster.yamlcore import printable

    for outcome in outcomes:
        for kind, left in (("left alone", outcome.left), ("not undone", outcome.failed)):
            for one in left:
                click.echo(f"{outcome.node}: {kind}: {one.title}: {one.reason}", err=True)
                for line in one.diff:
                    click.echo(f"      {_coloured(printable(line))}", err=True)
        if outcome.error:
            click.echo(f"{outcome.node}: {outcome.error.message} ({outcome.error.fix})", err=True)
    if all(outcome.complete for outcome in outcomes):
        options.say(f"{' and '.join(node.name for node in inventory.nodes)}: as they were before `up`")
        return 0
    click.echo("  try: `sparkctl down` again, or with --force where somebody else has changed a file", err=True)
    return 1
