"""Steps between the stages: headers and hidden states forward, what the last stage draws back to the first."""

from __future__ import annotations

import torch
import torch.distributed as dist

from launch.agent.report import pulse
from launch.inference.wire import HEADER, Order, WireStep
from launch.shard.buffers import Ring
from launch.shard.handoff import Handoff
from launch.shard.stage import Stage

CPU = torch.device("cpu")
HEADER_TAG, STEP_TAG, HIDDEN_TAG, REPLY_TAG = range(4)


class Link:
    """One rank's side of it. Both sides remember each group's last step, so that going on takes a header alone.

    As many steps are in flight as there are stages, so as many buffers of each kind take turns. The next header is awaited before a
    step is worked on: what is sent to someone who waits already needs no round trip.
    """

    def __init__(self, stage: Stage) -> None:
        self.handoff = Handoff(stage.device, alone=stage.cut.whole)
        self.world = self.handoff.world
        self._stage = stage
        self._last: dict[int, WireStep] = {}
        # Headers come without an answer too, when nothing is asked.
        self._headers, self._steps, self._replies = (
            Ring(CPU, 2 * self.world),
            Ring(CPU, self.world),
            Ring(CPU, self.world),
        )
        self._hidden = Ring(stage.device, self.world)
        self._header: tuple[dist.Work, torch.Tensor] | None = None

    def announce(self, step: WireStep) -> None:
        """Tell the next stage what comes; its hidden states follow with `hand_on`."""
        again = step.follows(self._last.get(step.group))
        self._last[step.group] = step
        if again:
            self._send(Order.AGAIN, step.group, 0)
        else:
            numbers = step.pack()
            self._send(Order.STEP, step.group, len(numbers))
            self.handoff.send_forward(numbers, STEP_TAG, self._steps)

    def signal(self, order: Order) -> None:
        """Send a header alone."""
        self._send(order, 0, 0)

    def hand_on(self, hidden: torch.Tensor) -> None:
        """Send hidden states [rows, tokens, hidden]; returns at once."""
        self.handoff.send_forward(hidden, HIDDEN_TAG, self._hidden)

    def await_reply(self, size: int) -> tuple[dist.Work, torch.Tensor]:
        """Start to receive what the last stage returns of a step."""
        return self.handoff.await_back((size,), torch.float64, REPLY_TAG, self._replies)

    def reply(self, numbers: torch.Tensor) -> None:
        """Return what was drawn to the first stage."""
        self.handoff.return_tokens(numbers, REPLY_TAG, self._replies)

    def next(self) -> tuple[Order, WireStep | None]:
        """Wait for the next header, and for what its step consists of."""
        work, header = self._header or self._await_header()
        work.wait()
        pulse()
        order, group, length, _ = header.tolist()
        self._header = None if order == Order.END else self._await_header()
        if order == Order.AGAIN:
            self._last[group] = self._last[group].again()
            return Order.AGAIN, self._last[group]
        if order == Order.STEP:
            numbers = self.handoff.recv_forward((length,), torch.float64, device=CPU, tag=STEP_TAG, ring=self._steps)
            self._last[group] = WireStep.unpack(numbers)
            return Order.STEP, self._last[group]
        return Order(order), None

    def hidden(self, step: WireStep) -> torch.Tensor:
        """Wait for the hidden states of a step."""
        shape = (len(step.rows), step.length, self._stage.hidden_size)
        return self.handoff.recv_forward(shape, self._stage.dtype, tag=HIDDEN_TAG, ring=self._hidden)

    def flush(self) -> None:
        """Wait until everything has left."""
        for ring in self._rings:
            ring.flush()

    @property
    def buffers(self) -> set[int]:
        """Addresses of all memory that is sent from and received into."""
        return {address for ring in self._rings for address in ring.addresses}

    @property
    def _rings(self) -> tuple[Ring, ...]:
        return self._headers, self._steps, self._hidden, self._replies

    def _await_header(self) -> tuple[dist.Work, torch.Tensor]:
        return self.handoff.await_forward((HEADER,), torch.int64, HEADER_TAG, self._headers)

    def _send(self, order: Order, group: int, length: int) -> None:
        if self.world > 1:
            self.handoff.send_forward(torch.tensor([order, group, length, 0]), HEADER_TAG, self._headers)
