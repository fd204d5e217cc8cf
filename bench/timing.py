"""Wall-clock time of work on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

CUDA_RUN_SECONDS = 0.02


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked for; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What one call returns, and the seconds until it is there."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - start


def best_seconds(work: Callable[[], object], device: torch.device, *, at_least: float = 0.8) -> float:
    """The shortest of two calls or more, until `at_least` seconds have passed, after a warm-up."""
    work()
    times: list[float] = []
    while len(times) < 2 or sum(times) < at_least:
        times.append(timed(work, device)[1])
    return min(times)


def repeated_seconds(work: Callable[[], object], device: torch.device, repeat: int) -> list[float]:
    """Seconds of each of `repeat` calls of work that is warm; on CUDA each is the mean of a run of calls.

    Such a run takes some milliseconds between two events on the GPU: a single short call would be mostly the
    wait for its launch.
    """
    if device.type != "cuda":
        return [timed(work, device)[1] for _ in range(repeat)]
    calls = max(1, min(1000, round(CUDA_RUN_SECONDS / timed(work, device)[1])))
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        synchronize(device)
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return times
