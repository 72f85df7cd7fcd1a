"""A rank that is another program: started with the pair's environment, its output passed on, and watched until it is ready.

The agent treats it as any rank: it ends it with its whole process group, and nothing of it outlives the agent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Container, Iterator
from pathlib import Path
from types import FrameType

from cluster.errors import FailedError, WrongInputError
from launch import command
from launch.agent.report import REPORT_FD, Report, Reporter
from launch.command import Words
from launch.job import JobFolder
from launch.recipe_schema import CommandRecipe
from launch.spec import JobSpec, RankSpec

POLL = 0.5  # seconds between two looks whether it answers
ANSWER_WITHIN = 3.0
# A program that fails within so many seconds would do so again: it is not started anew.
AT_ONCE = 10.0
_LONGEST_LINE = 1 << 16  # bytes: of a longer one, the pattern of `ready` sees pieces


def run(folder: JobFolder, spec: JobSpec, rank: int, reporter: Reporter) -> int:
    """Run the program to its end; its exit status.

    Raises:
        WrongInputError: it is not there.
        FailedError: it failed at once.
    """
    recipe = CommandRecipe.model_validate_json(json.dumps(spec.recipe_at(rank)))
    side = side_of(recipe, rank)
    words = words_of(spec, recipe, rank, os.environ.get("MASTER_ADDR", spec.master_addr))
    argv = command.argv(recipe, side, words)
    name = f"sparkctl-{spec.id}-{rank}"
    if recipe.image is not None:
        argv = _contained(recipe, argv, name, spec.ranks[rank], folder)
        _remove_container(name)  # what a power cut may have left
    environment = _environment(spec.env)
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
    except OSError as error:
        node = spec.ranks[rank].node
        raise WrongInputError(
            f"{node}: {argv[0]}: {error.strerror}", f"install it on {node}, or correct `command`"
        ) from None
    with _passing_on(process):
        reporter.tell(Report("running"))
        if recipe.ready is not None and recipe.ready.startswith(("http://", "https://")):
            threading.Thread(target=_await_answer, args=(words.fill(recipe.ready), reporter), daemon=True).start()
            pattern = None
        else:
            pattern = re.compile(words.fill(recipe.ready).encode()) if recipe.ready is not None else None
        _pass_on(process, pattern, reporter)
        status = process.wait()
    if recipe.image is not None:
        _remove_container(name)
    if status and time.monotonic() - began < AT_ONCE:
        raise FailedError(
            f"{Path(argv[0]).name} ended with status {status} at once", f"sparkctl logs {spec.id} --rank {rank}"
        )
    if status:
        reporter.tell(Report("failed", message=f"{Path(argv[0]).name} ended with status {status}"))
    return min(abs(status), 255)


def side_of(recipe: CommandRecipe, rank: int) -> int:
    """Whose argv a rank runs: where one side runs nothing, the only rank runs the other's."""
    running = command.sides(recipe)
    return running[min(rank, len(running) - 1)]


def words_of(spec: JobSpec, recipe: CommandRecipe, rank: int, head_addr: str) -> Words:
    """What the placeholders stand for. `head_addr`: where the ranks of this attempt meet; the peer's is on the same rail."""
    peer_addr = head_addr
    if spec.link is not None:
        ends = {end.address: other.address for end, other in spec.link.rails}
        peer_addr = ends.get(head_addr, spec.link.rails[0][1].address)
    return Words(side_of(recipe, rank), head_addr, peer_addr, spec.ranks[rank].model or recipe.model or "")


def _environment(given: Container[str]) -> dict[str, str]:
    """Ours, without what only a rank of our own has a use for; the port of the rendezvous is free for the program.

    `given`: the names of what the owner has set for it, which stay.
    """
    store = os.environ.get("SPARKCTL_STORE_FD")
    if store is not None:
        with contextlib.suppress(OSError):
            os.close(int(store))
    ours = ("SPARKCTL_STORE_FD", REPORT_FD, "SPARKCTL_ATTEMPT", *(() if "PYTHONPATH" in given else ("PYTHONPATH",)))
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    # The environment that `up` makes comes first: torchrun and jupyter lie in it.
    return kept | {"PATH": f"{Path(sys.executable).parent}:{kept.get('PATH', os.defpath)}"}


def _contained(
    recipe: CommandRecipe, argv: tuple[str, ...], name: str, local: RankSpec, folder: JobFolder
) -> tuple[str, ...]:
    assert recipe.image is not None
    given = {*local.environment, *folder.spec().env, *folder.spec().secrets, "MASTER_ADDR", "MASTER_PORT"}
    folders = {str(folder.path): True}
    if local.model.startswith("/"):
        folders[local.model] = False
    return command.in_container(
        recipe.image,
        argv,
        name=name,
        variables=given & os.environ.keys(),
        folders=folders,
        has_gpu=Path("/dev/nvidiactl").exists(),
        has_rdma=Path("/dev/infiniband").exists(),
    )


def _remove_container(name: str) -> None:
    if shutil.which("docker"):
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False, timeout=60)


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Have SIGTERM end the program and not us, so that its last words are still passed on; whatever happens, it ends with us."""

    def end(_number: int, _frame: FrameType | None) -> None:
        process.terminate()

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.kill()
            process.wait()


def _pass_on(process: subprocess.Popen[bytes], pattern: re.Pattern[bytes] | None, reporter: Reporter) -> None:
    """Its output is ours, until it ends; the first line that the pattern fits tells that it is ready."""
    assert process.stdout is not None
    rest = b""
    while chunk := os.read(process.stdout.fileno(), 1 << 16):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        if pattern is None:
            continue
        lines = (rest + chunk).split(b"\n")
        if any(pattern.search(line) for line in lines):
            reporter.tell(Report("ready"))
            pattern = None
        rest = lines[-1][-_LONGEST_LINE:]


def _await_answer(url: str, reporter: Reporter) -> None:
    """Look until it answers; an error of its own (5xx) is no answer, that it asks for a key (401) is one."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the pair's own addresses need no proxy
    while True:
        try:
            with opener.open(url, timeout=ANSWER_WITHIN):
                break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500:
                break
        except (OSError, ValueError):
            pass
        time.sleep(POLL)
    reporter.tell(Report("ready"))
