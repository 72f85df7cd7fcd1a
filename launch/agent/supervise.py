"""The agent that decides: starts an attempt's ranks, here and through the peer's agent, judges what both see, tries again or ends.

One node's ranks (the embedded pair has both of them on one) go through the same: there is only nobody to talk to.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import replace

from launch.agent import talk
from launch.agent.crew import GENTLE, Crew, Meeting
from launch.agent.events import Events
from launch.agent.ledger import Ledger
from launch.agent.stop import Leaving, StopAsked
from launch.agent.talk import Order
from launch.agent.unit import Unit
from launch.agent.view import LinkView, NodeView
from launch.agent.watch import SILENT, STARTED_WITHIN, STOPPED, Attempt, Verdict, cannot, is_well, judge, rails_up
from launch.job import JobFolder

TICK = 0.1
# Both sides must be down within 10 s of a failure; a peer that is silent for longer has seen to it by itself.
CLEAR_WITHIN = SILENT + 5.0
# After a boot it takes a while until the other node is heard.
HEARD_WITHIN = 60.0
# How long it is waited for both nodes to be well again, before the job is given up.
PATIENCE = 3600.0


class Supervisor:
    """The head's side of a job, or all of it where there is one node."""

    def __init__(self, folder: JobFolder, secrets: Mapping[str, str], unit: Unit) -> None:
        self.folder = folder
        self.spec = spec = folder.spec()
        node = spec.ranks[0].node
        self.crew = Crew(
            folder,
            spec.ranks_of(node) if spec.link else spec.ranks,
            spec.link.ends(0) if spec.link else (),
            secrets,
        )
        self.events = Events(folder)
        self.ledger = Ledger(folder)
        self.unit = unit
        self.wire = talk.wire(folder, spec, 0)
        if self.wire is not None:
            self.crew.watch(list(self.wire.sockets))
        self._order = Order(self.ledger.state)
        self._told_at = 0.0
        self._is_new = False

    # The whole of it.

    def run(self) -> None:
        """Supervise until the job has ended."""
        self.events.note("agent started", attempt=self.ledger.state.attempt)
        try:
            verdict = self._attempts()
        except StopAsked:
            verdict = STOPPED
        except Leaving:
            self._leave()
            raise
        except BaseException:
            self._clear()
            raise
        self._clear()
        self._finish(verdict)

    def give_up(self, verdict: Verdict) -> None:
        """End the job without another attempt, as soon as the peer hears of it."""
        self.events.note("verdict", state=verdict.state, reason=verdict.reason, again=False)
        deadline = time.monotonic() + HEARD_WITHIN
        while self.wire is not None and self.wire.body is None and time.monotonic() < deadline:
            self._tick()
        self._finish(verdict)

    def _attempts(self) -> Verdict:
        before = self.ledger.state
        number, verdict = before.attempt, None
        # The plan has just found that a new job fits; what that counted on may be in use by the page cache of its own staging.
        self._is_new = before.state == "staging" and number == 1
        if before.state != "staging":  # this agent was there before: its node lost power, or it was killed
            verdict = Verdict("failed", f"the agent of node {self.crew.node} ended without a word", again=True)
            number += 1
        while True:
            if verdict is not None:
                verdict = replace(verdict, again=verdict.again and number - before.first <= self.spec.restarts)
                if not verdict.again:
                    return verdict
                self._announce(number, verdict)
            trouble = self._until_well(first=verdict is None, since=verdict)
            if trouble is not None:
                return trouble
            verdict = self._attempt(number)
            self._clear()
            if not verdict.again:
                return verdict
            number += 1

    def _announce(self, number: int, verdict: Verdict) -> None:
        again = f"; starts again ({number - self.ledger.state.first} of {self.spec.restarts})"
        self.ledger.change(
            state="starting", attempt=number, reason=verdict.reason + again, fix=verdict.fix, rank_pids={}
        )
        self._order = Order(self.ledger.state, self._order.meeting)

    def _until_well(self, *, first: bool, since: Verdict | None) -> Verdict | None:
        """Wait until the job can be started; the verdict if it never can."""
        if not first:
            self._pause(self.spec.backoff)
        began, patience = time.monotonic(), STARTED_WITHIN if first else PATIENCE
        noted = ""
        while True:
            if self.folder.stop_asked():
                return STOPPED
            for node in self._nodes():
                if node.lost:
                    return cannot(self.spec.id, node)
            trouble = self._trouble(look_for_room=not (first and self._is_new))
            if not trouble:
                return None
            if trouble != noted:
                noted = trouble
                self.events.note("waits", reason=trouble)
            if time.monotonic() - began > patience:
                before = f" (before: {since.reason})" if since is not None else ""
                return Verdict(
                    "failed", f"{trouble}, for {patience:.0f} s{before}", "`sparkctl doctor` looks at both nodes"
                )
            self._tick()

    def _trouble(self, *, look_for_room: bool) -> str:
        """What keeps the job from being started, in words."""
        nodes = self._nodes()
        if self.wire is not None and len(nodes) < 2:
            return f"the agent of node {self.spec.ranks[1].node} does not answer"
        needed = [sum(rank.needed for rank in self.spec.ranks_of(node.node)) if look_for_room else 0 for node in nodes]
        return is_well(nodes, self._link(), needed)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.folder.stop_asked():
            self._tick()

    # One attempt.

    def _attempt(self, number: int) -> Verdict:
        link = self._link()
        rails = rails_up(self._nodes(), link) if link is not None else ()
        address = self.spec.link.ends(0)[rails[0]].address if self.spec.link is not None else self.spec.master_addr
        try:
            store = socket.create_server((address, 0), backlog=self.spec.world_size * 4)
        except OSError as error:
            return Verdict("failed", f"node {self.crew.node}: {address}: {error.strerror}", "`sparkctl up`", again=True)
        with store:  # handed to rank 0, so that its port is known to all ranks and free for certain
            meeting = Meeting(number, address, store.getsockname()[1], rails)
            self.events.note("attempt", attempt=number, rails=list(rails))
            self.ledger.change(state="starting", attempt=number, rank_pids={}, agent_pid=self.crew.view().agent_pid)
            self.crew.start(meeting, store)
        self._order = Order(self.ledger.state, meeting, run=True)
        self._tell()
        verdict = self._watch(Attempt(self.spec.id, number, 0.0, self.spec.world_size, self.spec.step_seconds, rails))
        self.events.note("verdict", state=verdict.state, reason=verdict.reason, again=verdict.again)
        return verdict

    def _watch(self, attempt: Attempt) -> Verdict:
        began = time.monotonic()
        while True:
            self._tick()
            nodes = self._nodes()
            if len(nodes) > 1 and nodes[1].attempt == attempt.number:
                attempt = replace(attempt, joined=True)
            self._note(nodes)
            if asked := self.folder.stop_asked():
                return self._stop(gently=asked == "gently")
            verdict = judge(replace(attempt, age=time.monotonic() - began), nodes, self._link())
            if verdict is not None:
                return verdict

    def _note(self, nodes: tuple[NodeView, ...]) -> None:
        """The state as the ranks tell it."""
        ranks = {rank.number: rank for node in nodes if node.attempt == self.crew.attempt for rank in node.ranks}
        state = self.ledger.state
        if 0 in ranks and ranks[0].phase in ("running", "ready") and state.state != ranks[0].phase:
            self.events.note(ranks[0].phase, attempt=state.attempt)
            state = state.model_copy(update={"state": ranks[0].phase, "reason": "", "fix": ""})
        warning = "; ".join(node.warning for node in nodes if node.warning)
        if warning != state.warning:
            self.events.note("warning", warning=warning)
        self.ledger.write(
            state.model_copy(
                update={"rank_pids": {number: rank.pid for number, rank in ranks.items()}, "warning": warning}
            )
        )
        self._order = replace(self._order, state=self.ledger.state)

    def _stop(self, *, gently: bool) -> Verdict:
        """Stop as somebody has asked: the ranks that can do so in good order get the time for it."""
        ranks = [rank for node in self._nodes() for rank in node.ranks if rank.status is None]
        self.events.note("stop asked", gently=gently)
        if gently and ranks and all(rank.gentle for rank in ranks):
            self._order = replace(self._order, gently=True)
            self.crew.ask_to_stop()
            deadline = time.monotonic() + GENTLE
            while time.monotonic() < deadline and self.folder.stop_asked() == "gently":
                self._tick()
                if not any(node.busy for node in self._nodes()):
                    break
        return STOPPED

    def _clear(self) -> None:
        """End every rank on both nodes, and wait until they are gone."""
        self._order = replace(self._order, run=False)
        self._tell()
        self.crew.end(self._tick)
        deadline = time.monotonic() + CLEAR_WITHIN
        while self.wire is not None and time.monotonic() < deadline:
            peer = self._peer()
            if peer is None or not peer.busy or self.wire.silence() > SILENT:
                break
            self._tick()
        self.events.note("ranks ended")

    def _finish(self, verdict: Verdict) -> None:
        self.ledger.change(
            state=verdict.state,
            reason=verdict.reason,
            fix=verdict.fix,
            failed_rank=verdict.rank,
            warning="",
            wrong_input=verdict.wrong_input,
        )
        self.events.note("ended", state=verdict.state)
        self._order = replace(self._order, state=self.ledger.state, run=False, ended=True)
        self.unit.disable()
        deadline = time.monotonic() + SILENT
        while self.wire is not None and time.monotonic() < deadline:
            self._tick()
            peer = self._peer()
            if peer is None or peer.ended:
                break
        self.ledger.flush()

    def _leave(self) -> None:
        """Go, for now: the ranks end, the job does not."""
        self._order = replace(self._order, run=False)
        self._tell()
        self.crew.end(self._tick)
        self.events.note("leaves")

    # What both see.

    def _nodes(self) -> tuple[NodeView, ...]:
        """This node and, once it was heard of, the other."""
        peer = self._peer()
        return (self.crew.view(),) if peer is None else (self.crew.view(), peer)

    def _peer(self) -> NodeView | None:
        return NodeView.of(self.wire.body) if self.wire is not None and self.wire.body is not None else None

    def _link(self) -> LinkView | None:
        if self.wire is None or self.spec.link is None:
            return None
        rails = range(len(self.spec.link.rails))
        return LinkView(self.wire.silence(), tuple(self.wire.silence_of(rail) for rail in rails))

    def _tick(self) -> None:
        """Listen for a moment, and tell the peer what it is to know."""
        for one in self.crew.listen(TICK):
            if self.wire is not None:
                self.wire.take(one)
        if time.monotonic() - self._told_at >= talk.EVERY:
            self._tell()
        self.ledger.flush()

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        if self.wire is not None:
            self.wire.tell(self._order.as_json())
