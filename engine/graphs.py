"""Work of a GPU that is recorded once and replayed, on streams that run beside each other.

A kernel of a mini-batch of a small model takes less time than Python takes to launch it. A CUDA graph launches them
all at once, but over the same memory and with the same numbers every time: what may change is in tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

Replay = Callable[[], None]


class Lane(Protocol):
    """A stream of work, and the memory that recordings of it share, of which one runs at a time."""

    def active(self) -> AbstractContextManager[object]:
        """The context whose work goes to this lane."""

    def record(self, work: Callable[[], None]) -> Replay:
        """Records `work`, which has run before, without running it; returns what runs it on the active lane."""

    def mark(self) -> Any:
        """A point behind all work that the lane has been given."""

    def wait(self, mark: Any) -> None:
        """Lets what the lane is given from now on run behind another lane's mark."""


class Lanes(NamedTuple):
    """The caller's own stream, and two beside it; what is recorded of `main` and `first` goes before the rest.

    main: the stream that is current. first: for a chain of small work, one piece waiting for another. last: for work
    that is to fill what the others leave idle.
    """

    main: Lane
    first: Lane
    last: Lane


def available(device: torch.device) -> bool:
    """Whether work of a device can be recorded."""
    return device.type == "cuda"


def lanes(device: torch.device) -> Lanes:
    """Lanes of a device on which recording is available."""
    return Lanes(
        _CudaLane(device, _FIRST, own=False),
        _CudaLane(device, _FIRST, own=True),
        _CudaLane(device, _LAST, own=True),
    )


_FIRST, _LAST = -1, 0
"""Priorities of streams. Blocks of threads of the first go to a multiprocessor before those of the last that wait for
one; none that runs is interrupted."""


class _CudaLane:
    def __init__(self, device: torch.device, priority: int, *, own: bool) -> None:
        """Without a stream of its `own`: the one that is current at every call."""
        self._device = device
        self._stream = torch.cuda.Stream(device, priority) if own else None
        # A graph's kernels keep the priority of the stream that they were recorded on, wherever it is replayed.
        self._recording = torch.cuda.Stream(device, priority)
        self._pool = torch.cuda.graph_pool_handle()

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._on())

    def record(self, work: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may go on using the device meanwhile. The outer context is for a recording that
        # fails, which leaves its stream current.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, self._pool, self._recording, capture_error_mode="thread_local"),
        ):
            work()
        replay: Replay = graph.replay
        return replay

    def mark(self) -> torch.cuda.Event:
        return self._on().record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        self._on().wait_event(mark)

    def _on(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._device)
