"""The agent of a job: starts each rank of its node, watches them, and ends all of them when one fails or when it ends itself."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from cluster import environ
from launch.agent.report import REPORT_FD, Report, Reports
from launch.job import JobFolder, JobState

# A rank that was asked to end gets this long before it is killed; both sides must be down within 10 s of a failure.
GRACE = 4.0
# When one rank dies the others fail on their broken connections; their reports are awaited this long to tell cause from echo.
ECHO = 1.0
POLL = 0.1


@dataclass
class _Rank:
    """A running rank and what it has told."""

    number: int
    node: str
    process: subprocess.Popen[bytes]
    pipe: int
    reports: Reports = field(default_factory=Reports)
    failure: Report | None = None
    died_at: float = 0.0

    def describe(self) -> str:
        """In words: who, and how it ended."""
        status = self.process.returncode
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"rank {self.number} (node {self.node}) {how}"

    def advice(self, job: str) -> str:
        """What its owner can do."""
        look = f"sparkctl logs {job} --rank {self.number}"
        if self.process.returncode == -signal.SIGKILL:  # nobody here sent it
            return f"if the node ran out of memory, `dmesg` there says so; {look}"
        return look


class _StopAsked(Exception):
    """SIGTERM or SIGINT arrived."""


class Supervisor:
    """One attempt at a job on this node."""

    def __init__(self, folder: JobFolder) -> None:
        self.folder = folder
        self.spec = folder.spec()
        self.state = JobState(state="starting", agent_pid=os.getpid())
        self.ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Supervise until the job has ended; returns the agent's exit status."""
        with self.folder.supervising():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _ask_to_stop)
            try:
                self._write(state="starting")
                self._start()
                self._watch()
            except _StopAsked:
                self._end_all()
                self._write(state="stopped", reason="stopped on request")
            except BaseException as error:
                self._end_all()
                self._write(state="failed", reason=f"the agent failed: {error}", fix=f"look at {self.folder.agent_log}")
                raise
            finally:
                self._end_all()
        return 0 if self.state.state == "succeeded" else 1

    def _start(self) -> None:
        # The store's socket is bound here and handed to rank 0, so its port is known to all ranks and free for certain.
        with socket.create_server((self.spec.master_addr, 0), backlog=self.spec.world_size * 4) as store:
            interfaces = tuple(name for _, name in socket.if_nameindex())
            for spec in self.spec.ranks:
                rendered = environ.embedded(
                    rank=spec.rank,
                    world_size=self.spec.world_size,
                    cores=os.cpu_count() or 1,
                    interfaces=interfaces,
                    port=store.getsockname()[1],
                )
                self.ranks.append(self._start_rank(spec.rank, spec.node, rendered, store.fileno()))
        self._write(rank_pids={rank.number: rank.process.pid for rank in self.ranks})

    def _start_rank(self, number: int, node: str, rendered: dict[str, str], store: int) -> _Rank:
        read, write = os.pipe()
        handed = {REPORT_FD: str(write), "SPARKCTL_ATTEMPT": str(self.state.attempt)}
        passed = [write]
        if number == 0:
            handed["SPARKCTL_STORE_FD"] = str(store)
            passed.append(store)
        try:
            with self.folder.log(number).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "sparkctl", "worker", str(self.folder.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environ.combine(os.environ, rendered | handed, self.spec.env | environ.secrets_of(os.environ)),
                    cwd=self.folder.path,
                    pass_fds=passed,
                    process_group=0,  # a terminal's Ctrl-C is the command line's business, not the ranks'
                )
        finally:
            os.close(write)
        rank = _Rank(number, node, process, read)
        os.set_blocking(read, False)
        self._selector.register(read, selectors.EVENT_READ, rank)
        return rank

    def _watch(self) -> None:
        while True:
            self._listen(POLL)
            dead = [rank for rank in self.ranks if rank.process.poll() is not None]
            for rank in dead:
                rank.died_at = rank.died_at or time.monotonic()
            if failed := [rank for rank in dead if rank.process.returncode != 0]:
                self._fail(failed)
                return
            if len(dead) == len(self.ranks):
                self._write(state="succeeded")
                return

    def _fail(self, failed: list[_Rank]) -> None:
        deadline = time.monotonic() + ECHO
        while time.monotonic() < deadline and not _cause(failed):
            self._listen(POLL)
            failed = [rank for rank in self.ranks if rank.process.poll() not in (None, 0)]
        culprit = _cause(failed) or min(failed, key=lambda rank: rank.died_at or time.monotonic())
        self._end_all()
        told = culprit.failure
        if told is not None and told.kind == "input":
            self._write(state="failed", reason=told.message, fix=told.fix, failed_rank=culprit.number, wrong_input=True)
            return
        self._write(
            state="failed",
            reason=culprit.describe() + (f": {told.message}" if told is not None else ""),
            fix=(told.fix if told is not None else "") or culprit.advice(self.folder.id),
            failed_rank=culprit.number,
        )

    def _listen(self, seconds: float) -> None:
        if not self._selector.get_map():  # select() would not wait for nothing
            time.sleep(seconds)
            return
        for key, _ in self._selector.select(seconds):
            rank: _Rank = key.data
            chunk = os.read(rank.pipe, 65536)
            if not chunk:  # the rank is gone, or about to be: poll() will say how
                self._selector.unregister(rank.pipe)
                os.close(rank.pipe)
                continue
            for report in rank.reports.feed(chunk):
                self._take(rank, report)

    def _take(self, rank: _Rank, report: Report) -> None:
        if report.event == "failed":
            rank.failure = report
        elif report.event == "running" and rank.number == 0 and self.state.state == "starting":
            self._write(state="running")

    def _end_all(self) -> None:
        """End every rank and what it started: asked first, killed after the grace."""
        alive = [rank for rank in self.ranks if rank.process.poll() is None]
        for rank in alive:
            _signal_group(rank.process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for rank in alive:
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal_group(rank.process, signal.SIGKILL)
                rank.process.wait()

    def _write(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)
        self.folder.write_state(self.state)


def _cause(failed: list[_Rank]) -> _Rank | None:
    """The rank whose end is a cause: killed, or failed for a reason of its own, not merely the echo of another's end."""
    own = [
        rank
        for rank in failed
        if rank.process.returncode < 0 or (rank.failure is not None and rank.failure.kind != "peer")
    ]
    return min(own, key=lambda rank: rank.died_at or float("inf"), default=None)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _ask_to_stop(_number: int, _frame: FrameType | None) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # a second request must not break into the ending of the ranks
        signal.signal(number, signal.SIG_IGN)
    raise _StopAsked


def main(folder: str) -> int:
    """The agent's entry: supervise the job whose folder is given."""
    os.umask(0o077)  # of the ranks too: a job's files are for the owner's eyes only
    return Supervisor(JobFolder(Path(folder))).run()
