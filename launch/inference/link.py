"""Steps between the stages: headers and hidden states forward, what the last stage draws back to the first."""

from __future__ import annotations

import torch
import torch.distributed as dist

from launch.inference.wire import HEADER, Order, WireStep
from launch.shard.handoff import Handoff
from launch.shard.stage import Stage

CPU = torch.device("cpu")
HEADER_TAG, STEP_TAG, HIDDEN_TAG, REPLY_TAG = range(4)


class Link:
    """One rank's side of it. Both sides remember each group's last step, so that going on takes a header alone."""

    def __init__(self, stage: Stage) -> None:
        self.handoff = Handoff(stage.device, alone=stage.cut.whole)
        self.world = self.handoff.world
        self._stage = stage
        self._last: dict[int, WireStep] = {}

    def announce(self, step: WireStep) -> None:
        """Tell the next stage what comes; its hidden states follow with `hand_on`."""
        again = step.follows(self._last.get(step.group))
        self._last[step.group] = step
        if again:
            self._send(Order.AGAIN, step.group, 0)
        else:
            numbers = step.pack()
            self._send(Order.STEP, step.group, len(numbers))
            self.handoff.send_forward(numbers, tag=STEP_TAG)

    def signal(self, order: Order) -> None:
        """Send a header alone."""
        self._send(order, 0, 0)

    def hand_on(self, hidden: torch.Tensor) -> None:
        """Send hidden states [rows, tokens, hidden]; returns at once."""
        self.handoff.send_forward(hidden, tag=HIDDEN_TAG)

    def await_reply(self, size: int) -> tuple[dist.Work, torch.Tensor]:
        """Start to receive what the last stage returns of a step."""
        return self.handoff.await_back((size,), torch.float64, tag=REPLY_TAG)

    def reply(self, numbers: torch.Tensor) -> None:
        """Return what was drawn to the first stage."""
        self.handoff.return_tokens(numbers, tag=REPLY_TAG)

    def next(self) -> tuple[Order, WireStep | None]:
        """Wait for the next header, and for what its step consists of."""
        header = self.handoff.recv_forward((HEADER,), torch.int64, device=CPU, tag=HEADER_TAG)
        order, group, length, _ = (int(value) for value in header)
        if order == Order.AGAIN:
            self._last[group] = self._last[group].again()
            return Order.AGAIN, self._last[group]
        if order == Order.STEP:
            numbers = self.handoff.recv_forward((length,), torch.float64, device=CPU, tag=STEP_TAG)
            self._last[group] = WireStep.unpack(numbers)
            return Order.STEP, self._last[group]
        return Order(order), None

    def hidden(self, step: WireStep) -> torch.Tensor:
        """Wait for the hidden states of a step."""
        shape = (len(step.rows), step.length, self._stage.hidden_size)
        return self.handoff.recv_forward(shape, self._stage.dtype, tag=HIDDEN_TAG)

    def flush(self) -> None:
        """Wait until everything has left."""
        self.handoff.flush()

    def _send(self, order: Order, group: int, length: int) -> None:
        if self.world > 1:
            self.handoff.send_forward(torch.tensor([order, group, length, 0]), tag=HEADER_TAG)
