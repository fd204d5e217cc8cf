"""Wall-clock time of work on a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
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


def rotating(works: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Each call does the next of the works: with inputs of their own, what the caches hold is another's."""
    turns = cycle(works)
    return lambda: next(turns)()


def replayed_seconds(works: Sequence[Callable[[], object]], device: torch.device, repeat: int) -> list[float]:
    """`repeated_seconds` of warm works in rotation, replayed from a CUDA graph: without the launches' own time.

    Raises RuntimeError where they cannot be captured. Elsewhere than on CUDA there is nothing to replay.
    """
    if device.type != "cuda":
        return repeated_seconds(rotating(works), device, repeat)
    graph = torch.cuda.CUDAGraph()
    # The outer context is for a capture that fails, which leaves its stream current.
    with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    return [seconds / len(works) for seconds in repeated_seconds(graph.replay, device, repeat)]


def cache_bytes(device: torch.device) -> int:
    """Bytes that the GPU's level-2 cache holds; 0 for other devices, whose caches nobody asks for."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
