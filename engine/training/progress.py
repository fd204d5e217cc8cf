"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import datetime, timedelta

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Between two lines."""


class Clock:
    """Tells when the run of `total_steps` will end, if it goes on as it did since `resume_step`."""

    def __init__(self, total_steps: int, resume_step: int) -> None:
        self._total, self._resumed = total_steps, resume_step
        self._start = time.monotonic()

    def end(self, step: int) -> str:
        """The expected end after `step`, local time, with the date where that is not today."""
        pace = (time.monotonic() - self._start) / (step - self._resumed)
        now = datetime.now()
        end = now + timedelta(seconds=pace * (self._total - step))
        return end.strftime("%H:%M" if end.date() == now.date() else "%Y-%m-%d %H:%M")


class Bar:
    """A bar with the last step's loss, gradient norm and speed."""

    def __init__(self, total_steps: int, resume_step: int) -> None:
        self._clock = Clock(total_steps, resume_step)
        self._bar = tqdm(
            total=total_steps, initial=resume_step, unit="step", file=sys.stderr, dynamic_ncols=True
        )

    def write(self, values: Mapping[str, int | float]) -> None:
        """Moves on by a step."""
        self._bar.set_postfix_str(_summary(values, self._clock), refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


class Lines:
    """The same as a line for the first and the last step, and every half minute."""

    def __init__(self, total_steps: int, resume_step: int) -> None:
        self._total = total_steps
        self._clock = Clock(total_steps, resume_step)
        self._printed = -float("inf")
        self._waiting: str | None = None

    def write(self, values: Mapping[str, int | float]) -> None:
        """Prints the line, or keeps it in case that it is the last one."""
        self._waiting = f"step {values['step']}/{self._total}: {_summary(values, self._clock)}"
        if time.monotonic() - self._printed >= LINE_SECONDS:
            self._print()

    def close(self) -> None:
        """Prints the last step's line, if that was not done."""
        self._print()

    def _print(self) -> None:
        if self._waiting is not None:
            print(self._waiting, file=sys.stderr, flush=True)
            self._printed, self._waiting = time.monotonic(), None


def _summary(values: Mapping[str, int | float], clock: Clock) -> str:
    return (
        f"loss {values['loss']:.4f}, grad {values['grad_norm']:.3g}, {values['tokens_per_s']:,.0f} tokens/s, "
        f"ends {clock.end(int(values['step']))}"
    )
