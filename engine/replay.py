"""Reading on a GPU: slabs and mini-batches replayed from CUDA graphs, the prefix blocks ahead of the suffix blocks.

There is a graph for every place in the windows' memory that tokens are written to. These are few: a window's worth of
tokens later the same places come again. Nothing in a call waits for the GPU but the check of its tokens.

A mini-batch is a chain of many small kernels, which leave much of a GPU idle, and cannot begin before the one before it
has been learnt from. So multiprocessors take its blocks of threads first, and those of the slabs ahead in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine import graphs
from engine.blocks import Cache, prefix_forward, suffix_forward
from engine.caches import FixedRows
from engine.inner import inner_forward, inner_gradient, inner_update_
from engine.ops import IGNORED, Ops
from engine.prefill import Reader
from engine.profiling import stage
from engine.state import State
from engine.weights import for_inference
from engine.window import Window
from engine.workspace import Slot, Workspace, workspace

if TYPE_CHECKING:
    from engine.model import TTTModel


@contextmanager
def reader(model: TTTModel, state: State, ops: Ops, tokens: int) -> Iterator[Reader]:
    """What reads `tokens` tokens of each sequence into a state; the state has read them when the context ends."""
    if not _replays(model, ops, tokens):
        yield Reader(model, state, ops)
        return
    space = workspace(model, state.batch_size, for_inference(model), ops, ReplayReader.ahead + 1)
    with space.in_turn():
        space.state.copy_from(state)
        yield ReplayReader(model, space, ops)
        state.copy_from(space.state)


def _replays(model: TTTModel, ops: Ops, tokens: int) -> bool:
    """Whether there may be something to replay, and what runs can be recorded."""
    config, device = model.config, model.final_norm.device
    if config.window is None or tokens < 2 * config.mini_batch_size:
        # Keys of attention without a window have no lasting place; fewer tokens may have no whole mini-batch.
        return False
    # Of weights made in inference mode nobody can tell whether they are still what was recorded.
    return graphs.available(device) and ops.recordable and not model.final_norm.is_inference()


def _add_rows(windows: Sequence[Window], tokens: int) -> int:
    """Makes room in windows that have read the same tokens; returns the first of the new rows."""
    starts = {window.add_rows(tokens) for window in windows}
    assert len(starts) <= 1
    return starts.pop() if starts else 0


class ReplayReader(Reader):
    """As `Reader`, on a workspace."""

    ahead = 1

    def __init__(self, model: TTTModel, space: Workspace, ops: Ops) -> None:
        super().__init__(model, space.state, ops)
        self._space = space
        self._next = 0
        self._written: list[Slot] = []

    def _read_slabs(self, tokens: Tensor, nll: Tensor) -> None:
        main, *others = self._space.lanes
        for lane in others:
            lane.wait(main.mark())
        try:
            super()._read_slabs(tokens, nll)
        finally:
            # Of what was given up halfway too: the caller's memory and the workspace's are used until then.
            for lane in others:
                main.wait(lane.mark())

    def _read_prefix(self, tokens: Tensor, first: int) -> Tensor:
        space, state, length = self._space, self._state, tokens.shape[1]
        lane = space.lanes.last
        slot = space.slots[self._next % len(space.slots)]
        self._next += 1
        self._written.append(slot)
        with lane.active():
            if slot.free is not None:
                lane.wait(slot.free)
            if length == state.slab:
                space.tokens.copy_(tokens)
                torch.arange(first, first + length, out=space.positions)
                start = _add_rows(state.prefix, length)
                with stage("prefix"):
                    space.run(lane, ("prefix", start), partial(self._slab, start))
                slot.x.copy_(space.hidden)
            else:
                slot.x[:, :length] = super()._read_prefix(tokens, first)
            slot.ready = lane.mark()
        return slot.x[:, :length]

    def _read_suffix(self, tokens: Tensor, slab: slice, x: Tensor, nll: Tensor) -> None:
        lane, slot = self._space.lanes.first, self._written.pop(0)
        with lane.active():
            lane.wait(slot.ready)
            super()._read_suffix(tokens, slab, x, nll)
            slot.free = lane.mark()

    def _read_mini_batch(self, tokens: Tensor, x: Tensor, known: Tensor, nll: Tensor) -> None:
        state, space = self._state, self._space
        with stage("inner step"):
            if known.shape[1] == x.shape[1]:
                self._replay("step", x, state.tokens_read, known)
            else:
                targets = torch.nn.functional.pad(known, (0, 1), value=IGNORED)
                self._replay("look", x, state.tokens_read, targets)
                state.add_pending(tokens, x)
            nll[:] = space.nll[:, : known.shape[1]]
            state.last_hidden = space.last_hidden

    def _read_again(self, x: Tensor, first: int, targets: Tensor) -> None:
        self._replay("step", x, first, targets)

    def _replay(self, kind: str, x: Tensor, first: int, targets: Tensor) -> None:
        """Gives a graph of a mini-batch its numbers and runs it."""
        space = self._space
        space.x.copy_(x)
        space.targets.copy_(targets)
        torch.arange(first, first + x.shape[1], out=space.own_positions)
        start = _add_rows(self._state.suffix, x.shape[1])
        work = self._learn if kind == "step" else self._only_look
        space.run(space.lanes.first, (kind, start), partial(work, start))

    def _slab(self, start: int) -> None:
        """The prefix blocks' work on a slab whose keys and values go to rows from `start` on."""
        space, state = self._space, self._state
        x = torch.nn.functional.embedding(space.tokens, self._weights.embed)
        rows = self._rows(state.prefix, start)
        arguments = (self._ops, self._weights.prefix, x, space.positions, rows, self._config.window)
        space.hidden.copy_(prefix_forward(*arguments))

    def _learn(self, start: int) -> None:
        """The inner step of a mini-batch whose keys and values go to rows from `start` on."""
        space, ops, config, weights, fast = (
            self._space,
            self._ops,
            self._config,
            self._weights,
            self._state.fast,
        )
        rows = self._rows(self._state.suffix, start)
        arguments = (space.x, space.own_positions, space.targets, rows)
        read = inner_forward(ops, config, weights, fast, *arguments)
        space.nll.copy_(read.nll)
        space.last_hidden.copy_(read.hidden[:, -1])
        grads = inner_gradient(ops, config, weights, fast, read, space.targets)
        inner_update_(ops, config, fast, grads, config.inner_lr)

    def _only_look(self, start: int) -> None:
        """As `_learn`, without the step."""
        space, ops, weights = self._space, self._ops, self._weights
        rows = self._rows(self._state.suffix, start)
        out, _ = suffix_forward(
            ops,
            weights.suffix,
            self._state.fast.copies,
            space.x,
            space.own_positions,
            rows,
            self._config.window,
        )
        hidden, _ = ops.norm(out, weights.final_norm)
        space.nll.copy_(ops.nll(hidden, weights.head, space.targets))
        space.last_hidden.copy_(hidden[:, -1])

    @staticmethod
    def _rows(windows: Sequence[Window], start: int) -> list[Cache]:
        return [FixedRows(window.k, window.v, start) for window in windows]
