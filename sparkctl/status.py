"""`status`: both nodes and the link, on one screen."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from sparkctl.options import Options, common

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.facts import Facts
    from cluster.inventory import Inventory
    from cluster.record import PairRecord
    from cluster.transport import Transport

EVERY = 2.0  # seconds between two looks of --watch


@dataclass(frozen=True)
class NodeStatus:
    """A node as it is now; None is unknown or not there. Bytes, degrees Celsius, W, %; `link_mbps` and `carrier` by rail."""

    name: str
    error: str | None = None
    memory_free: int | None = None
    memory_total: int | None = None
    disk_free: int | None = None
    gpu: str | None = None
    temperature: float | None = None
    power: float | None = None
    utilization: float | None = None
    link_mbps: tuple[int | None, ...] = ()
    addresses: tuple[str, ...] = ()
    jobs: int | None = None

    @classmethod
    def of(cls, facts: Facts, interfaces: tuple[str, ...]) -> NodeStatus:
        """Read the facts; `interfaces` are the rails'."""
        from cluster.facts import known

        memory, home, gpus = known(facts.memory, None), known(facts.sparkctl, None), known(facts.gpus, ())
        place = home.path if home else "/"
        disk = next((one for one in known(facts.disks, ()) if one.path == place), None)
        gpu = gpus[0] if gpus else None
        nics = [nic for name in interfaces if (nic := facts.nic(name))]
        return cls(
            facts.node,
            memory_free=memory.allocatable if memory else None,
            memory_total=memory.total if memory else None,
            disk_free=disk.free if disk and isinstance(disk.free, int) else None,
            gpu=gpu.name if gpu else None,
            temperature=gpu.temperature if gpu else None,
            power=gpu.power if gpu else None,
            utilization=gpu.utilization if gpu else None,
            link_mbps=tuple(nic.speed if nic.carrier else None for nic in nics),
            addresses=tuple(str(address) for nic in nics for address in nic.ipv4),
            jobs=len(home.jobs) if home else None,
        )


@click.command()
@click.option("--watch", is_flag=True, help="Look again every two seconds, until Ctrl-C.")
@click.option("--env", "show_env", is_flag=True, help="Print the environment of each rank, as a shell reads it.")
@common
def status(options: Options, watch: bool, show_env: bool) -> int:
    """Show both nodes (memory, disk, GPU, link, jobs) and what `up` last verified. Exit status 1: a node is not reached."""
    from cluster import record, transport

    inventory = options.inventory()
    if show_env:
        return _environment(options, inventory)
    transports = [transport.to(node) for node in inventory.nodes]
    if inventory.embedded:
        transports = transports[:1]  # both nodes are this machine
    known = None if inventory.embedded else record.load(inventory)
    try:
        while True:
            nodes = _look(inventory, transports, known)
            _show(options, inventory, nodes, known, clear=watch)
            if not watch:
                return int(any(node.error for node in nodes))
            time.sleep(EVERY)
    finally:
        for one in transports:
            one.close()


def _look(inventory: Inventory, transports: list[Transport], known: PairRecord | None) -> list[NodeStatus]:
    from cluster.errors import SparkctlError
    from cluster.survey import each, facts_of

    def look(rank: int) -> NodeStatus:
        node = inventory.nodes[rank]
        interfaces = tuple(rail.ends[rank].interface for rail in known.rails) if known else ()
        try:
            return NodeStatus.of(facts_of(transports[rank], node), interfaces)
        except SparkctlError as error:
            return NodeStatus(node.name, error=error.message)

    return each(range(len(transports)), look)


def _show(
    options: Options, inventory: Inventory, nodes: list[NodeStatus], known: PairRecord | None, *, clear: bool
) -> None:
    from sparkctl.show import banner, print_table

    if options.json:
        pair = known.model_dump(mode="json") if known else None
        document = {"embedded": inventory.embedded, "nodes": [asdict(node) for node in nodes], "pair": pair}
        click.echo(json.dumps(document, indent=None if clear else 1))
        return
    if clear:
        click.clear()
    options.say(banner(inventory))
    print_table(table(nodes))
    for node in nodes:
        if node.error:
            click.echo(f"{node.name}: {node.error}")
    if known is not None:
        rails = ", ".join(f"{rail.ends[0].address.ip} <-> {rail.ends[1].address.ip}" for rail in known.rails)
        speed = f"{known.link.gbps:.3g} Gbit/s, " if known.link.gbps is not None else ""
        options.say(f"link: {rails}; MTU {known.rails[0].mtu}; {speed}{known.link.verdict} (`up` of {known.when})")
        if known.link.verdict != "ok" and known.link.evidence:
            options.say(f"      {known.link.evidence}")
    elif not inventory.embedded:
        options.say("not paired from here: `sparkctl up` makes the pair")


def table(nodes: list[NodeStatus]) -> Table:
    """A row for each node."""
    from rich.table import Table

    from sparkctl.show import size

    shown = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("node", "memory free", "disk free", "GPU", "load", "temperature", "power", "link", "jobs"):
        shown.add_column(name, justify="left" if name in ("node", "GPU") else "right", no_wrap=True)
    for node in nodes:
        free, total = node.memory_free, node.memory_total
        shown.add_row(
            node.name,
            f"{size(free)} of {size(total)}" if free is not None and total else "?",
            size(node.disk_free) if node.disk_free is not None else "?",
            node.gpu or "none",
            f"{node.utilization:g} %" if node.utilization is not None else "",
            f"{node.temperature:g} °C" if node.temperature is not None else "",
            f"{node.power:g} W" if node.power is not None else "",
            " + ".join(f"{one // 1000} Gbit/s" if one else "no carrier" for one in node.link_mbps),
            str(node.jobs) if node.jobs is not None else "?",
        )
    return shown


def _environment(options: Options, inventory: Inventory) -> int:
    """What each rank gets: the record's variables under the inventory's `env`."""
    from cluster import environ, record
    from cluster.errors import RefusedError

    if inventory.embedded:
        raise RefusedError(
            "the ranks of an embedded pair get their environment when a job starts", "`sparkctl up` on two nodes first"
        )
    known = record.load(inventory)
    if known is None:
        raise RefusedError("these nodes are not paired from here", "sparkctl up")
    ranks = [environ.shown(variables, inventory.env) for variables in known.environment]
    if options.json:
        click.echo(json.dumps([environ.as_mapping(variables) for variables in ranks], indent=1))
        return 0
    for rank, (node, variables) in enumerate(zip(known.nodes, ranks, strict=True)):
        click.echo(f"# rank {rank}: {node.name}")
        click.echo(environ.as_text(variables), nl=False)
    return 0
