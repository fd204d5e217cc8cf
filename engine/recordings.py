"""Graphs over one piece of static memory, and who may use it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine import graphs
from engine.graphs import Lane, Replay


@contextmanager
def lasting() -> Iterator[None]:
    """The context in which static memory is made: memory of inference mode cannot be written to outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Recordings:
    """Static memory has one of these: its lanes, its graphs, and its users one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.lanes = graphs.lanes(device)
        self._replays: dict[tuple[object, ...], Replay] = {}
        self._used: Any = None
        self._lock = threading.Lock()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The context in which one uses the memory, behind all before: maybe of other threads and on other streams.

        Whoever gives work to lanes beside `main` has that wait for them, what is given up halfway included.
        """
        with self._lock:
            if self._used is not None:
                self.lanes.main.wait(self._used)
            try:
                yield
            finally:
                self._used = self.lanes.main.mark()

    def run(self, lane: Lane, key: tuple[object, ...], work: Callable[[], None]) -> None:
        """Runs `work` on a lane that is active, or what was recorded of it under the same key.

        The first time it runs as it is, which compiles its kernels and finds their best configurations: neither can
        happen while it is recorded.
        """
        replay = self._replays.get(key)
        if replay is not None:
            replay()
            return
        work()
        self._replays[key] = lane.record(work)
