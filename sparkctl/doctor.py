"""`doctor`: what is wrong with the pair, and what to do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparkctl.options import Options, common

if TYPE_CHECKING:
    from cluster.finding import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "unknown": "blue"}


@click.command()
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write facts, findings and logs, redacted, to this archive (tar.gz), to attach to a report.",
)
@common
def doctor(options: Options, bundle: Path | None) -> int:
    """Examine both nodes and the link: what is wrong, the evidence, the fix. Exit status 1: something is."""
    from cluster import checkup, transport
    from cluster.finding import Level

    inventory = options.inventory()
    transports = [transport.to(node) for node in inventory.nodes]
    try:
        checked = checkup.checkup(inventory, transports)
    finally:
        for one in transports:
            one.close()
    if bundle is not None:
        checkup.write_bundle(checked, inventory, bundle)
        options.say(f"{bundle}: facts, findings and logs; look through it before you send it")
    if options.json:
        click.echo(json.dumps([asdict(finding) for finding in checked.findings], indent=1))
    else:
        tell(options, checked.findings)
    return int(any(finding.level is Level.FAIL for finding in checked.findings))


def tell(options: Options, findings: tuple[Finding, ...]) -> None:
    """The worst first; what is well in one line."""
    from cluster.finding import Level
    from cluster.yamlcore import printable

    for level in (Level.FAIL, Level.WARN, Level.UNKNOWN):
        for finding in findings:
            if finding.level is level:
                where = f"{finding.node}: " if finding.node else ""
                word = click.style(f"{level:<7}", fg=_COLOURS[level])
                click.echo(f"{word} {finding.check}: {where}{printable(finding.evidence)}")
                if finding.fix:
                    click.echo(f"        {click.style('try', fg='cyan')}: {printable(finding.fix)}")
    well = list(dict.fromkeys(finding.check for finding in findings if finding.level is Level.OK))
    options.say(f"{click.style(f'{Level.OK:<7}', fg=_COLOURS[Level.OK])} {', '.join(well)}")
