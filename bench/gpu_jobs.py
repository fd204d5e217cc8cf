"""Processes for measurements: what one of them does not survive, the others do."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from bench.gpu_plan import Measurement, Settings, describe, start_seconds
from bench.output import progress

CHILD = str(Path(__file__).with_name("gpu_child.py"))
GRACE = 10.0
"""Seconds after the deadline in which a measurement that was begun may still end."""
TOO_LONG, MORE, MORE_SIDE_BY_SIDE = 4.0, 60.0, 150.0
"""A measurement that takes so many times as long as was thought, and then so many seconds, hangs: more of them where
kernels are compiled, as many at once as there are processors."""
MOST_PROCESSES = 12

Put = Callable[[str, dict[str, Any]], None]


def run_side_by_side(
    groups: Sequence[list[Measurement]], settings: Settings, deadline: float, put: Put
) -> None:
    """Groups of which nothing is timed: as many at once as the processors compile kernels for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    stop = threading.Event()
    with (
        # What is fastest beside others is not what is fastest alone: nobody else shall read these choices.
        tempfile.TemporaryDirectory() as choices,
        ThreadPoolExecutor(max(1, min(MOST_PROCESSES, cores - 1))) as pool,
    ):
        # Processes that had as many threads each as there are processors would wait for one another.
        environment = {"TTT_KERNELS_CACHE": choices, "OMP_NUM_THREADS": "1"}
        try:
            futures = [pool.submit(run_group, g, settings, deadline, put, environment, stop) for g in groups]
            for done in futures:
                done.result()
        finally:
            # Where this was interrupted, those under way are not waited for.
            stop.set()


def run_group(
    group: Sequence[Measurement],
    settings: Settings,
    deadline: float,
    put: Put,
    environment: dict[str, str] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Does the measurements of a group by one process, and those after one that it did not survive by another.

    Once `stop` is set, nothing further is done or told.
    """
    left, stop = list(group), stop or threading.Event()
    while left and not stop.is_set():
        left = _run(left, settings, deadline, put, environment or {}, stop)


def _run(
    group: list[Measurement],
    settings: Settings,
    deadline: float,
    put: Put,
    environment: dict[str, str],
    stop: threading.Event,
) -> list[Measurement]:
    """What is left to be done after one process."""
    if all(time.time() + start_seconds(settings) + m.seconds > deadline for m in group):
        for m in group:
            put(m.key, {"status": "skipped", "reason": "no time left"})
        return []
    process = subprocess.Popen(
        [sys.executable, CHILD],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | environment,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        job = {
            "device": settings.device,
            "dtype": settings.dtype,
            "deadline": deadline,
            "measurements": [asdict(m) for m in group],
        }
        try:
            with process.stdin as pipe:
                json.dump(job, pipe)
        except BrokenPipeError:
            # It ended before it read; its status tells below.
            pass
        done, begun, reason = _listen(process, group, deadline, put, stop)
    finally:
        end(process)
    left = [m for m in group if m.key not in done]
    if not left or stop.is_set():
        return []
    lost = next((m for m in left if m.key == begun), None)
    if lost is None and done:
        # It ended between two of them, by itself.
        return left
    # Without a word that any was begun, the first one is what the process did not get to.
    lost = lost or left[0]
    put(lost.key, {"status": "failed", "reason": reason or _ended(process.returncode)})
    return [m for m in left if m is not lost]


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process with all that it has started, and waits for it."""
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _listen(
    process: subprocess.Popen[str],
    group: list[Measurement],
    deadline: float,
    put: Put,
    stop: threading.Event,
) -> tuple[set[str], str | None, str | None]:
    """Keys that came, the one under way at the end, and why the process had to be ended, if it had to."""
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    limits = {m.key: TOO_LONG * m.seconds + (MORE_SIDE_BY_SIDE if m.parallel else MORE) for m in group}
    done: set[str] = set()
    begun = None
    until = time.time() + max(limits.values())
    while not stop.is_set():
        limit = min(until, deadline + GRACE)
        try:
            line = lines.get(timeout=max(0.0, min(0.5, limit - time.time())))
        except queue.Empty:
            if time.time() >= limit:
                return done, begun, "no time left" if time.time() >= deadline else "it did not end"
            continue
        if line is None:
            process.wait()
            return done, begun, None
        result = json.loads(line)
        key = result.pop("key")
        if result["status"] == "begun":
            begun, until = key, time.time() + limits[key]
            progress(f"{describe(next(m for m in group if m.key == key))}\n")
            continue
        done.add(key)
        put(key, result)
        until = time.time() + max(limits.values())
    return done, begun, None


def _read(pipe: TextIO, lines: queue.Queue[str | None]) -> None:
    for line in pipe:
        # A process that is killed may leave half a line.
        if line.endswith("\n"):
            lines.put(line)
    lines.put(None)


def _ended(status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"the process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"the process ended with status {status}"
