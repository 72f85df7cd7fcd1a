"""What a run shows: one JSON object a logged step, and the same as TensorBoard's charts. Written by rank 0 alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from launch.job import JobFolder


@dataclass(frozen=True)
class StepMetrics:
    """One logged step. `loss` and `token_accuracy` are means over the learned tokens since the last logged step.

    `busy` and `memory` have an entry for each rank, see Vitals; `seconds` counts from the first step of this attempt.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    token_accuracy: float
    tokens_per_s: float
    seconds: float = 0.0
    busy: tuple[float, ...] = ()
    memory: tuple[int, ...] = ()


class MetricsLog:
    """Appends to metrics.jsonl and to the TensorBoard folder of a job."""

    def __init__(self, folder: JobFolder, *, after: int = 0) -> None:
        """Go on after a step: what TensorBoard was told beyond it is forgotten; in the file the last word on a step counts."""
        self._file = folder.metrics.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=after + 1 if after else None)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._writer.close()

    def log(self, metrics: StepMetrics) -> None:
        """Add one step to both."""
        self._append(asdict(metrics))
        for name in ("epoch", "grad_norm", "learning_rate", "loss", "token_accuracy"):
            self._writer.add_scalar(f"train/{name}", getattr(metrics, name), metrics.step)

    def log_evaluation(self, step: int, loss: float, accuracy: float) -> None:
        """Add an evaluation to both."""
        self._append({"step": step, "eval_loss": loss, "eval_token_accuracy": accuracy})
        self._writer.add_scalar("eval/loss", loss, step)
        self._writer.add_scalar("eval/token_accuracy", accuracy, step)

    def _append(self, entry: dict[str, float]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
