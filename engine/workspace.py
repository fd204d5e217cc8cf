"""Memory of a model in which graphs run: whatever a graph reads or writes stays where it is."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from engine.ops import Ops
from engine.recordings import Recordings, lasting
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


class Workspace(Recordings):
    """Static memory for reading B sequences, and the graphs recorded over it.

    A state's contents are copied here and back, once for each call; so graphs serve every state of the model.

    Attributes:
        state: the state that is read into.
        tokens, positions: (B, slab) and (slab,) int64, the slab that the prefix blocks read.
        hidden: (B, slab, d), what they make of it.
        slots: copies of `hidden` that wait for the suffix blocks.
        x, targets, own_positions: (B, b, d), (B, b) and (b,) int64, the mini-batch that the suffix blocks read.
        nll, last_hidden: (B, b) fp32 and (B, d), what they make of it.
    """

    @lasting()
    def __init__(self, model: TTTModel, batch_size: int, weights: Weights, slots: int) -> None:
        config, device = model.config, model.final_norm.device
        super().__init__(device)
        self.weights = weights
        # The model is a key of those that keep this, who would keep it for ever.
        self.state = State(cast("TTTModel", weakref.proxy(model)), batch_size, roomy=True)
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
