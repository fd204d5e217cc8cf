"""What is told about a training run: progress, `metrics.jsonl`, and Weights & Biases where asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from engine.training.distributed import rank
from engine.training.metrics import MetricsFile
from engine.training.progress import Bar, Lines
from engine.training.wandb_run import WandbOptions, WandbRun

METRICS_FILE = "metrics.jsonl"


class Output(Protocol):
    """Something that is told of every step."""

    def write(self, values: Mapping[str, int | float]) -> None:
        """Takes the step's values, by name."""

    def close(self) -> None:
        """Called once, after the last step."""


class TrainLog:
    """Tells of every step of a run of `total_steps` that goes on after step `resume_step` (0: from the start).

    On a terminal there is a progress bar on stderr, elsewhere a line now and then. `folder`, made if need be,
    has `metrics.jsonl`, of which lines about steps after `resume_step` are dropped. Only the first process
    tells anything: in the others every method does nothing. Usable as a context manager, which closes it.

    Raises:
        ValueError: a `resume_step` outside the run, a damaged `metrics.jsonl`, or a package that is missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        total_steps: int,
        wandb: WandbOptions | None = None,
        resume_step: int = 0,
    ) -> None:
        if not 0 <= resume_step <= total_steps:
            raise ValueError(
                f"resume_step={resume_step} is not accepted: it must be from 0 to total_steps={total_steps}"
            )
        self._last = resume_step
        self._outputs: list[Output] = []
        if rank() != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs.append(MetricsFile(folder / METRICS_FILE, resume_step))
        if wandb is not None:
            self._outputs.append(WandbRun(wandb, folder, resumed=resume_step > 0))
        self._outputs.append((Bar if sys.stderr.isatty() else Lines)(total_steps, resume_step))

    def record(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        inner_lr: float,
        tokens: int,
        seconds: float,
    ) -> None:
        """Tells of a step.

        Args:
            step: how many updates are complete with this one; one more than the last time.
            loss: in nats per token, the mean over all processes.
            grad_norm: before clipping.
            tokens: read in this step, by all processes together.
            seconds: that this step took.

        Raises:
            ValueError: a step out of order, or `seconds` not above 0.
        """
        if step != self._last + 1:
            raise ValueError(f"step={step} is not accepted: it must be {self._last + 1}, one after the last")
        if not seconds > 0:
            raise ValueError(f"seconds={seconds} is not accepted: it must be above 0")
        self._last = step
        values = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "inner_lr": inner_lr,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "seconds": seconds,
        }
        for output in self._outputs:
            output.write(values)

    def close(self) -> None:
        """Ends the bar, the file and the run at Weights & Biases."""
        for output in self._outputs:
            output.close()
        self._outputs = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
