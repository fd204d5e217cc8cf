"""Memory of a model in which graphs run: whatever a graph reads or writes stays where it is."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine import graphs
from engine.graphs import Lane, Replay
from engine.ops import Ops
from engine.state import State
from engine.weights import Weights

if TYPE_CHECKING:
    from engine.model import TTTModel


class Slot:
    """Where the prefix blocks leave a slab for the suffix blocks.

    x: (B, slab, d). ready: a mark of the prefix's lane behind the slab. free: one of the suffix's lane behind all that
    reads it; None before the first.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.ready: Any = None
        self.free: Any = None


class Workspace:
    """Static memory for reading B sequences, and the graphs recorded over it.

    A state's contents are copied here and back, once for each call; so graphs serve every state of the model.

    Attributes:
        state: the state that is read into.
        lock: held by whoever reads here.
        tokens, positions: (B, slab) and (slab,) int64, the slab that the prefix blocks read.
        hidden: (B, slab, d), what they make of it.
        slots: copies of `hidden` that wait for the suffix blocks.
        x, targets, own_positions: (B, b, d), (B, b) and (b,) int64, the mini-batch that the suffix blocks read.
        nll, last_hidden: (B, b) fp32 and (B, d), what they make of it.
    """

    def __init__(self, model: TTTModel, batch_size: int, weights: Weights, slots: int) -> None:
        config, device = model.config, model.final_norm.device
        self.weights = weights
        self.lanes = graphs.lanes(device)
        self.lock = threading.Lock()
        self.state = State(model, batch_size, roomy=True)
        slab, size = self.state.slab, config.mini_batch_size
        like = torch.empty(0, dtype=config.torch_dtype, device=device)

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.tokens, self.positions = whole(batch_size, slab), whole(slab)
        self.hidden = like.new_zeros(batch_size, slab, config.hidden_size)
        self.slots = [Slot(torch.zeros_like(self.hidden)) for _ in range(slots)]
        self.x = like.new_zeros(batch_size, size, config.hidden_size)
        self.targets, self.own_positions = whole(batch_size, size), whole(size)
        self.nll = torch.zeros(batch_size, size, dtype=torch.float32, device=device)
        self.last_hidden = like.new_zeros(batch_size, config.hidden_size)
        self._replays: dict[tuple[object, ...], Replay] = {}
        self._used: list[Any] = []

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The context in which one reads here, behind all that were here before: maybe of other threads and streams."""
        for mark in self._used:
            self.lanes.main.wait(mark)
        try:
            yield
        finally:
            # Of both lanes, because what was given up halfway has not brought them together.
            self._used = [lane.mark() for lane in self.lanes]

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


_workspaces: weakref.WeakKeyDictionary[TTTModel, tuple[object, Workspace]] = weakref.WeakKeyDictionary()


def workspace(model: TTTModel, batch_size: int, weights: Weights, ops: Ops, slots: int) -> Workspace:
    """The model's workspace, made anew where the last one was for other weights, sequences or backends."""
    kind = (batch_size, ops.backends)
    found = _workspaces.get(model)
    if found is None or found[0] != kind or found[1].weights is not weights:
        # Before the new one, so that both never take up memory at once.
        _workspaces.pop(model, None)
        found = None
        _workspaces[model] = found = (kind, Workspace(model, batch_size, weights, slots))
    return found[1]
