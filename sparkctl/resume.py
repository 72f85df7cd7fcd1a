"""`resume`: a job that was stopped or has failed goes on where it was."""

from __future__ import annotations

import json

import click

from sparkctl.options import Options, common


@click.command()
@click.argument("job")
@click.option("--detach", is_flag=True, help="Start it, print its id and return.")
@click.option("--force", is_flag=True, help="Also with other code than it ran with, or over a link below its bar.")
@common
def resume(options: Options, job: str, detach: bool, force: bool) -> int:
    """Go on with JOB, which was stopped or has failed: a fine-tune from its last complete checkpoint, the rest from the start.

    It stays the same job, in the same folder. What its recipe named may have been put right meanwhile, but not changed: for
    another recipe, run that.
    """
    from launch import again
    from sparkctl.jobs import wait_until_gone
    from sparkctl.run import follow_any

    with options.pair() as pair:
        found = pair.find(job)
        if len(found.spec.ranks) > 1 and not force:
            pair.refuse_bad_link()
        if found.state().ended:
            wait_until_gone(found)
        again.resume(found, pair, force=force)
        if detach:
            click.echo(json.dumps({"job": found.id}) if options.json else found.id)
            return 0
        return follow_any(options, pair, found)
