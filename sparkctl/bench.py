"""`bench`: measure what the pair gives."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from sparkctl.bench_serve import serve
from sparkctl.options import Options, common

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.measurement import Measurement, Run


@click.group()
def bench() -> None:
    """Measure what the pair gives."""


bench.add_command(serve)


@bench.command()
@click.option("--seconds", type=click.FloatRange(0.2, 60), default=2.0, show_default=True, help="For each run.")
@common
def link(options: Options, seconds: float) -> int:
    """Measure the link: packets, both rails at once and alone, and an all-reduce by two ranks. Exit status 3: below the bar."""
    from cluster import pairing, transport
    from cluster.errors import RefusedError
    from sparkctl.doctor import tell

    inventory = options.inventory()
    if inventory.embedded:
        raise RefusedError("the embedded pair has no link: its two ranks share this machine", "name two nodes with -i")
    transports = [transport.to(node) for node in inventory.nodes]
    try:
        paired, taken, findings = pairing.remeasure(inventory, transports, seconds=seconds)
    finally:
        for one in transports:
            one.close()
    if options.json:
        document = {"link": paired.link.model_dump(mode="json", exclude={"measurement"}), "measurement": asdict(taken)}
        click.echo(json.dumps(document | {"findings": [asdict(finding) for finding in findings]}, indent=1))
    elif not options.quiet:
        from sparkctl.show import print_table

        print_table(table(taken))
        tell(options, findings)
    if paired.link.verdict == "below bar":
        raise RefusedError(paired.link.evidence, paired.link.fix)
    return 0


def table(taken: Measurement) -> Table:
    """A row for each run: by what, from where to where, and Gbit/s on each rail and in all."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("by", "direction", "rail 0", "rail 1", "Gbit/s in all"):
        shown.add_column(name, justify="left" if name in ("by", "direction") else "right", no_wrap=True)
    for run in taken.runs:
        names = taken.nodes[run.sender], taken.nodes[1 - run.sender]
        shown.add_row(run.method.upper(), " -> ".join(names), *(_of(run, rail) for rail in (0, 1)), f"{run.gbps:.1f}")
    found = taken.collective
    if found is not None and not found.error:
        shown.add_row(f"all-reduce, {found.backend}", "both ways", "", "", f"{found.bus * 8:.1f}")
    return shown


def _of(run: Run, rail: int) -> str:
    flow = next((flow for flow in run.flows if flow.rail == rail), None)
    return "" if flow is None else flow.error or f"{flow.gbps:.1f}"
