"""What a run will need, before it is launched: memory and time of its steps, and the settings that fit the device.

Trials of one step each are made with what there is to choose; a sequence that is longer than a trial takes is
extrapolated from two trials in which the window is full, beyond which time and memory are linear in the length. Of
snapshots, whose stretches are taken back by rollback, what they add to that is computed. What is best by this is
rehearsed: tried once more as it will run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from engine.device import available_bytes
from engine.loss import DEFAULT_METHOD, DEFAULT_SNAPSHOT_EVERY, METHODS
from engine.snapshots import snapshot_bytes
from engine.training.run import AUTO, Run
from engine.training.trial import Choice, Cost, try_out

RESERVE = 0.9
"""The share of the free memory that a step may take."""
_LONGEST_MINI_BATCHES = DEFAULT_SNAPSHOT_EVERY
_GAIN = 0.97
"""What needs more memory, or a longer search, has to be predicted to take at most this share of the time."""


class Trial(Protocol):
    """As `try_out`."""

    def __call__(self, run: Run, choice: Choice, length: int, passes: int = 1) -> Cost | None: ...


@dataclass(frozen=True)
class Plan:
    """A choice, and what is predicted of it.

    peak: bytes of the process at its highest. seconds: of an outer step, accumulation and update included.
    """

    choice: Choice
    accum_steps: int
    peak: int
    seconds: float

    @property
    def overrides(self) -> str:
        """What to put on the command line of `train`."""
        return (
            f"training.accum_steps={self.accum_steps} training.method={self.choice.method} "
            f"training.checkpoint_blocks={str(self.choice.checkpoint_blocks).lower()}"
        )


def fit(run: Run) -> int:
    """Prints the plans that were tried and the one to take; 0, or 1 where none fits."""
    free = available_bytes(torch.device(run.device))
    print(
        f"{run.model.name}: {run.global_batch_size} sequences of {run.seq_length} tokens a step; "
        f"{free / 2**30:.1f} GiB free on {run.device}, of which {RESERVE:.0%} may be used\n"
    )
    print("sequences at a time  accumulation  method     blocks again  peak memory  time per step")
    found = []
    for plan in plans(run, free, try_out):
        print(_row(plan), flush=True)
        found.append(plan)
    if any(_fits(plan, free) for plan in found):
        print("\nthe most promising at full length:")
    best = None
    for plan in rehearsed(run, free, found, try_out):
        print(_row(plan), flush=True)
        best = _better(best, plan, free)
    if best is None:
        print("\nnothing fits: use more accumulation, shorter sequences or another device")
        return 1
    print(f"\nthe fastest that fits:  {best.overrides}")
    return 0


def plans(run: Run, free: int, trial: Trial) -> Iterator[Plan]:
    """Every way to go back, with one sequence at a time; then more at a time for the fastest that fits."""
    trial = partial(_remembered, trial, {})
    found = []
    for method, again in _ways(run):
        plan = predicted(run, Choice(1, method, again), trial)
        if plan is not None:
            yield plan
            found.append(plan)
    fitting = [plan for plan in found if _fits(plan, free)]
    while fitting:
        best = min(fitting, key=lambda plan: plan.seconds)
        rows = 2 * best.choice.rows
        if run.global_batch_size % rows:
            return
        larger = predicted(run, Choice(rows, best.choice.method, best.choice.checkpoint_blocks), trial)
        if larger is None:
            return
        yield larger
        fitting = [larger] if _fits(larger, free) and larger.seconds <= _GAIN * best.seconds else []


def rehearsed(run: Run, free: int, found: list[Plan], trial: Trial) -> Iterator[Plan]:
    """The plans that may be the best of all, the most promising first, as measured in two passes at full length."""
    best = None
    for plan in sorted((p for p in found if _fits(p, free)), key=lambda p: p.seconds):
        if best is not None and plan.seconds > _GAIN * best.seconds:
            return
        cost = trial(run, plan.choice, run.seq_length, passes=2)
        if cost is not None:
            sure = replace(plan, peak=cost.peak, seconds=plan.accum_steps * cost.seconds + cost.update)
            yield sure
            best = _better(best, sure, free)


def _fits(plan: Plan, free: int) -> bool:
    return plan.peak <= RESERVE * free


def _better(best: Plan | None, plan: Plan, free: int) -> Plan | None:
    """The faster one of those that fit."""
    faster = best is None or plan.seconds < best.seconds
    return plan if _fits(plan, free) and faster else best


def _ways(run: Run) -> list[tuple[str, bool]]:
    """(method, whether blocks are computed again), the ones that the run leaves open."""
    methods: list[str] = [DEFAULT_METHOD]
    if run.model.suffix_layers:
        methods = list(METHODS) if run.method == AUTO else [run.method]
    if run.method == AUTO and run.seq_length <= _stretch(run):
        methods = [method for method in methods if method != "snapshots"]
    again = [False, True] if run.checkpoint_blocks is None else [run.checkpoint_blocks]
    return [(method, choice) for method in methods for choice in again]


def predicted(run: Run, choice: Choice, trial: Trial) -> Plan | None:
    """Memory and time of a step; None where not even the trial fits."""
    accum = run.global_batch_size // choice.rows
    lengths = trial_lengths(run)
    again = (run.seq_length - 1) // _stretch(run) * _stretch(run) if choice.method == "snapshots" else 0
    tried = replace(choice, method="rollback") if again else choice
    costs = [trial(run, tried, length) for length in lengths]
    first, last = costs[0], costs[-1]
    if first is None or last is None:
        return None

    def at(length: int, value: Callable[[Cost], float]) -> float:
        if length == lengths[-1]:
            return value(last)
        slope = (value(last) - value(first)) / (lengths[1] - lengths[0])
        return value(last) + slope * (length - lengths[1])

    seconds = at(run.seq_length, lambda cost: cost.seconds)
    peak = at(_stretch(run) if again else run.seq_length, lambda cost: cost.peak)
    if again:
        # Read twice, from snapshots at the start of every stretch but the first.
        seconds += at(again, lambda cost: cost.forward)
        snapshot = choice.rows * snapshot_bytes(run.model, DEFAULT_SNAPSHOT_EVERY)
        peak += again // _stretch(run) * snapshot
    return Plan(choice, accum, int(peak), accum * seconds + last.update)


def _stretch(run: Run) -> int:
    """Tokens from one snapshot to the next."""
    return DEFAULT_SNAPSHOT_EVERY * run.model.mini_batch_size


def trial_lengths(run: Run) -> list[int]:
    """The run's own length where that is tried itself; else two lengths with a full window.

    They are far enough apart that the noise of a measurement is hardly larger in the slope between the two.
    """
    config = run.model
    unit = config.mini_batch_size
    if config.window is None:
        return [run.seq_length]
    full = -(-config.window // unit) * unit
    lengths = [full + unit, 4 * (full + unit)]
    return [run.seq_length] if run.seq_length <= max(_LONGEST_MINI_BATCHES * unit, lengths[1]) else lengths


def _remembered(
    trial: Trial, costs: dict[tuple[Choice, int], Cost | None], run: Run, choice: Choice, length: int
) -> Cost | None:
    """`trial`, but each once."""
    if (choice, length) not in costs:
        costs[choice, length] = trial(run, choice, length)
    return costs[choice, length]


def _row(plan: Plan) -> str:
    return (
        f"{plan.choice.rows:19}  {plan.accum_steps:12}  {plan.choice.method:9}  "
        f"{'yes' if plan.choice.checkpoint_blocks else 'no':>12}  {plan.peak / 2**30:7.2f} GiB  "
        f"{plan.seconds:11.2f} s"
    )
