"""The agent on the peer: does what the head's agent says, tells it what it sees, and ends its rank when the head is silent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from launch.agent import talk
from launch.agent.crew import Crew, Meeting
from launch.agent.events import Events
from launch.agent.ledger import Ledger
from launch.agent.talk import Order
from launch.agent.unit import Unit
from launch.agent.watch import SILENT
from launch.job import JobFolder, JobState

# An agent without a word from the head goes on waiting for so long: its node may take a while to come back.
PATIENCE = 3600.0
# How long the end of the job is acknowledged.
FAREWELL = 1.0
TICK = 0.1


class Deputy:
    """The peer's side of a job. `lost`: why it can start no rank any more; it only tells the head so, and waits for the end."""

    def __init__(self, folder: JobFolder, secrets: Mapping[str, str], unit: Unit, *, lost: str = "") -> None:
        spec = folder.spec()
        assert spec.link is not None  # or there would be no peer
        self.folder = folder
        self.crew = Crew(folder, spec.ranks_of(folder.node()), spec.link.ends(1), secrets)
        self.events = Events(folder)
        self.ledger = Ledger(folder)
        self.unit = unit
        wire = talk.wire(folder, spec, 1)
        assert wire is not None
        self.wire = wire
        self.crew.watch(list(wire.sockets))
        self._lost = lost
        self._told_at = 0.0
        self._gently_asked = False
        self._ended = False
        self._attempt = self.ledger.state.attempt if self.ledger.state.state != "staging" else 0

    def run(self) -> None:
        """Serve until the job has ended."""
        self.events.note("agent started", attempt=self._attempt)
        try:
            while not self._serve():
                self._tick()
        finally:
            self.crew.end(self._tick)
            for _ in range(3):  # a datagram may be lost, and this one is not repeated
                self._tell(leaving=not self._ended)
            self.wire.close()

    def _serve(self) -> bool:
        """Do what is to be done now; whether the job has ended."""
        silent = self.wire.silence()
        if silent > SILENT and self.crew.view().busy:
            self.events.note("head silent", seconds=round(silent, 1))
            self.crew.end(self._tick)
            self.events.note("ranks ended")
        if silent > PATIENCE:
            return self._end(JobState(state="failed", reason=f"the head was silent for {PATIENCE / 60:.0f} minutes"))
        if self.folder.stop_asked() and silent > SILENT:
            return self._end(
                JobState(state="stopped", reason="stopped on request, while the head was not to be reached")
            )
        if self.wire.body is None:
            return False
        return self._obey(Order.of(self.wire.body))

    def _obey(self, order: Order) -> bool:
        if order.ended:
            self.crew.end(self._tick)
            return self._end(order.state)
        view, meeting = self.crew.view(), order.meeting
        if self._lost:
            return False
        if meeting is not None and order.run and meeting.attempt > self._attempt and self.wire.silence() < SILENT:
            self._start(order, meeting)
        elif view.busy and not order.run:
            self.crew.end(self._tick)
            self.events.note("ranks ended")
        elif view.busy and order.gently and not self._gently_asked:
            self._gently_asked = True
            self.crew.ask_to_stop()
        self._note(order.state)
        return False

    def _start(self, order: Order, meeting: Meeting) -> None:
        self.crew.end(self._tick)
        self._attempt = meeting.attempt  # written down first: an agent that comes back must not start it a second time
        self._gently_asked = False
        self._note(order.state)
        self.events.note("attempt", attempt=meeting.attempt, rails=list(meeting.rails))
        self.crew.start(meeting)

    def _note(self, state: JobState) -> None:
        """Write the job's state here too, with this node's processes."""
        view = self.crew.view()
        ranks = {rank.number: rank.pid for rank in view.ranks}
        self.ledger.write(
            state.model_copy(
                update={"attempt": self._attempt, "agent_pid": view.agent_pid, "rank_pids": ranks, "updated": ""}
            )
        )

    def _end(self, state: JobState) -> bool:
        self.crew.end(self._tick)
        self._ended = True
        self._note(state)
        self.events.note("ended", state=state.state)
        self.unit.disable()
        deadline = time.monotonic() + FAREWELL
        while time.monotonic() < deadline:
            self._tick()
        return True

    def _tick(self) -> None:
        for one in self.crew.listen(TICK):
            self.wire.take(one)
        if time.monotonic() - self._told_at >= talk.EVERY:
            self._tell()
        self.ledger.flush()

    def _tell(self, *, leaving: bool = False) -> None:
        self._told_at = time.monotonic()
        view = replace(self.crew.view(), ended=self._ended, leaving=leaving, lost=self._lost)
        self.wire.tell(view.as_json())
