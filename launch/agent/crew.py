"""The ranks of one node: started, listened to, looked at, and ended with all that they have started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster import environ
from cluster.readings import box as readings
from launch.agent.gpu import GpuWatch
from launch.agent.report import REPORT_FD, STOP_SIGNAL, Report, Reports
from launch.agent.view import MOST_TEXT, NodeView, Phase, RankView
from launch.box import RESERVE, SMALL
from launch.job import JobFolder
from launch.log_times import LogTimes
from launch.spec import EndSpec, RankSpec

# A rank that was asked to end gets this long before it is killed; both sides must be down within 10 s of a failure.
GRACE = 4.0
# A rank that has said that it can stop in good order (writes a checkpoint, lets requests end) gets this long for it.
GENTLE = 60.0
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of an attempt meet: rank 0's store, and the rails that work."""

    attempt: int
    address: str
    port: int
    rails: tuple[int, ...] = ()


@dataclass
class _Rank:
    """A rank that was started, and what it has told."""

    spec: RankSpec
    process: subprocess.Popen[bytes]
    pipe: int
    reports: Reports = field(default_factory=Reports)
    phase: Phase = "started"
    step: int = 0
    moved_at: float | None = None  # None: no progress is expected
    slowest: float = 0.0
    died_at: float | None = None
    halted_at: float | None = None
    gentle: bool = False
    failure: Report | None = None

    def take(self, report: Report) -> None:
        now = time.monotonic()
        match report.event:
            case "failed":
                self.failure = report
            case "loading" | "running" | "ready":
                self.phase = report.event
                self.moved_at = None
            case "rest":
                self.moved_at = None
            case "gentle":
                self.gentle = True
            case "step" | "beat":
                if self.moved_at is not None:
                    self.slowest = max(self.slowest, now - self.moved_at)
                self.moved_at = now
                self.step = max(self.step, report.step)

    def look(self, now: float) -> RankView:
        status = self.process.poll()
        if status is not None and self.died_at is None:
            self.died_at = now
        if status is None and _is_halted(self.process.pid):
            self.halted_at = self.halted_at or now
        else:
            self.halted_at = None
        failure = self.failure or Report("failed")
        return RankView(
            self.spec.rank,
            self.spec.node,
            self.process.pid,
            self.phase,
            self.step,
            status,
            dead_for=0.0 if self.died_at is None else now - self.died_at,
            still_for=None if self.moved_at is None or status is not None else now - self.moved_at,
            halted_for=0.0 if self.halted_at is None else now - self.halted_at,
            slowest=self.slowest,
            gentle=self.gentle,
            told=self.failure is not None,
            kind=failure.kind,
            message=failure.message[:MOST_TEXT],
            fix=failure.fix[:MOST_TEXT],
        )


class Crew:
    """The ranks that run on this node, at most one attempt's at a time.

    Args:
        ranks: those of this node.
        ends: the node's ends of the rails; none where there is no link.
        secrets: the inventory's, which stand in no file.
    """

    def __init__(
        self, folder: JobFolder, ranks: Sequence[RankSpec], ends: Sequence[EndSpec], secrets: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self.spec = folder.spec()
        self.node = ranks[0].node
        self.attempt = 0
        self._specs = tuple(ranks)
        self._ends = tuple(ends)
        self._secrets = dict(secrets)
        self._ranks: list[_Rank] = []
        self._gpu = GpuWatch(self.node)
        self._times = LogTimes(folder, [rank.rank for rank in ranks])
        self._selector = selectors.DefaultSelector()
        if sys.platform == "linux":  # what a rank's end leaves becomes a child of ours
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def watch(self, sockets: Sequence[socket.socket]) -> None:
        """Have `listen` wake when one of them has something to read."""
        for one in sockets:
            self._selector.register(one, selectors.EVENT_READ, None)

    def start(self, meeting: Meeting, store: socket.socket | None = None) -> None:
        """Start the ranks of an attempt. Of the head's, rank 0 is handed the socket of the store."""
        self.attempt = meeting.attempt
        self._ranks = []
        for spec in self._specs:
            self._ranks.append(self._start(spec, meeting, store if spec.rank == 0 else None))

    def _start(self, spec: RankSpec, meeting: Meeting, store: socket.socket | None) -> _Rank:
        read, write = os.pipe()
        given = {REPORT_FD: str(write), "SPARKCTL_ATTEMPT": str(meeting.attempt)}
        passed = [write]
        if store is not None:
            given["SPARKCTL_STORE_FD"] = str(store.fileno())
            passed.append(store.fileno())
        rendered = over_rails(spec.environment, self._ends, meeting.rails) | {
            "MASTER_ADDR": meeting.address,
            "MASTER_PORT": str(meeting.port),
        }
        try:
            with self.folder.log(spec.rank).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "sparkctl", "worker", str(self.folder.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environ.combine(os.environ, rendered | given, self.spec.env | self._secrets),
                    cwd=self.folder.path,
                    pass_fds=passed,
                    process_group=0,  # a terminal's Ctrl-C is the command line's business, not the ranks'
                )
        finally:
            os.close(write)
        rank = _Rank(spec, process, read)
        os.set_blocking(read, False)
        self._selector.register(read, selectors.EVENT_READ, rank)
        return rank

    def listen(self, seconds: float) -> list[socket.socket]:
        """Take what the ranks tell, for `seconds` at most; returns the watched sockets that have something to read."""
        self._times.note()
        if not self._selector.get_map():  # select() would not wait for nothing
            time.sleep(seconds)
            return []
        ready: list[socket.socket] = []
        for key, _ in self._selector.select(seconds):
            rank: _Rank | None = key.data
            if rank is None:
                assert isinstance(key.fileobj, socket.socket)
                ready.append(key.fileobj)
                continue
            chunk = os.read(rank.pipe, 65536)
            if not chunk:  # the rank is gone, or about to be: poll() will say how
                self._selector.unregister(rank.pipe)
                os.close(rank.pipe)
                continue
            for report in rank.reports.feed(chunk):
                rank.take(report)
        return ready

    def view(self) -> NodeView:
        """This node as it is now."""
        now = time.monotonic()
        available, total = _memory()
        return NodeView(
            self.node,
            self.attempt,
            tuple(rank.look(now) for rank in self._ranks),
            available,
            min(RESERVE, total // SMALL),
            tuple(carrier(end.interface) for end in self._ends),
            _disk_free(self.folder.path),
            agent_pid=os.getpid(),
            warning=self._gpu.warning[:MOST_TEXT],
        )

    def ask_to_stop(self) -> None:
        """Ask the ranks to stop in good order; they end by themselves."""
        for rank in self._ranks:
            if rank.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    rank.process.send_signal(STOP_SIGNAL)

    def end(self, tick: Callable[[], None] = lambda: None) -> None:
        """End every rank and what it started: asked first, killed after the grace. `tick` is called while it takes."""
        alive = [rank.process for rank in self._ranks if rank.process.poll() is None]
        for process in alive:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while (running := [process for process in alive if process.poll() is None]) and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running[0].wait(0.1)
            tick()
        for process in alive:
            if process.poll() is None:
                _signal_group(process, signal.SIGKILL)
                process.wait()
        _end_strays()


def over_rails(rendered: Mapping[str, str], ends: Sequence[EndSpec], rails: Sequence[int]) -> dict[str, str]:
    """The environment with only the interfaces of the rails that work. Pure.

    What names several interfaces or devices, one for each rail, keeps those of `rails`; what names one that is down gets the first
    that is up.
    """
    if not rails or len(rails) == len(ends):
        return dict(rendered)
    up, down = (
        [ends[rail].interface for rail in rails],
        [end.interface for rail, end in enumerate(ends) if rail not in rails],
    )
    found = dict(rendered)
    for name, value in rendered.items():
        words = value.split(",")
        if len(words) == len(ends) and len(words) > 1 and name in _BY_RAIL:
            found[name] = ",".join(words[rail] for rail in rails)
        elif value in down:
            found[name] = up[0]
    return found


_BY_RAIL = ("GLOO_SOCKET_IFNAME", "NCCL_IB_HCA")


def carrier(interface: str) -> bool:
    """Whether an interface is up and its cable lives."""
    try:
        return Path(f"/sys/class/net/{interface}/carrier").read_text(encoding="ascii").strip() == "1"
    except OSError:  # it is down, or not there
        return False


def _memory() -> tuple[int | None, int]:
    """Bytes available, and of the whole node; None and 0 where it cannot be told."""
    try:
        found = readings.memory(Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        return None, 0
    return (found.available, found.total) if found is not None else (None, 0)


def _disk_free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _is_halted(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] == ["T"]


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if number is not signal.SIGKILL:
            os.killpg(process.pid, signal.SIGCONT)  # one that was stopped hears nothing else
        os.killpg(process.pid, number)


def _end_strays() -> None:
    """Kill what ranks have started in a session of its own: as a subreaper, it is ours by now."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    with contextlib.suppress(OSError):
        for pid in map(int, children.read_text(encoding="ascii").split()):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
