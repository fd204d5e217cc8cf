"""Training's inner loop on a GPU: every step forward, and every step back, replayed from a CUDA graph.

What engine/through_time.py does, over static memory: there is a graph for each number of earlier tokens that a
mini-batch may see, which stops growing at the window's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine import graphs
from engine.caches import FixedRows, by_cache, limit
from engine.cotangents import leaf
from engine.inner import flat, inner_forward, inner_gradient, inner_update_
from engine.profiling import stage
from engine.rollback import Before
from engine.step_back import Step, step_back
from engine.sweep_space import space_for
from engine.weights import Fast, mapped, tensors
from ttt_kernels.clipped_sgd.reference import scale_of
from ttt_kernels.swiglu.reference import Factors

if TYPE_CHECKING:
    from engine.through_time import Loop


def replays(loop: Loop, x: Tensor) -> bool:
    """Whether a loop can be recorded; inner gradients that are to be reported would be lost in a graph."""
    window = loop.config.window is not None
    return window and not loop.keep_inner_grads and loop.ops.recordable and graphs.available(x.device)


class ReplaySweep:
    """As `engine.through_time.Sweep`."""

    def __init__(
        self, loop: Loop, x: Tensor, past: Sequence[Tensor], masters: Fast, *, goes_back: bool
    ) -> None:
        self._loop = loop
        self._x = x.detach()
        self._parts = loop.parts
        self._goes_back = goes_back
        self._count = 3 * len(loop.weights.suffix)
        self._known_rows = past[0].shape[1]
        batch, length = x.shape[:2]
        # (2 S, B, n + T, H, D): keys and values of all tokens, those before x first.
        self._rows = x.new_empty(len(past), batch, self._known_rows + length, *past[0].shape[2:])
        for mine, theirs in zip(self._rows, past, strict=True):
            mine[:, : self._known_rows] = theirs.detach()
        self._space = space_for(loop.ops, loop.config, loop.weights, masters, x)
        self._stored = mapped(loop.weights, Tensor.detach)
        self._nll, self._slope, self._lse = (
            torch.empty(batch, length, *shape, dtype=t.dtype, device=x.device)
            for t, shape in ((self._space.nll, ()), (self._space.slope, x.shape[2:]), (self._space.lse, ()))
        )
        # Of every step, for the way back.
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._last: list[Tensor] = []

    @torch.no_grad()
    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """nll (B, T), the last fast weights, and what later tokens may see of every block's keys and values."""
        loop, space = self._loop, self._space
        with space.in_turn():
            space.load(self, self._stored, loop.lr)
            space.load_fast(given[-self._count :])
            for index in range(len(self._parts)):
                with stage("inner step"):
                    self._read(index)
            self._last = [t.clone() for t in flat(space.fast.masters)]
        seen = limit(loop.config.window, self._x.shape[1])
        return (
            self._nll.clone(),
            *(t.clone() for t in self._last),
            *self._rows[:, :, self._rows.shape[2] - seen :].unbind(),
        )

    @torch.no_grad()
    def backward(self, *cotangents: Tensor | None) -> list[Tensor | None]:
        """Cotangents of x, of earlier keys and values, of every slow weight and of the first fast weights."""
        d_nll, *rest = cotangents
        space, d_fast, d_rows = self._space, rest[: self._count], rest[self._count :]
        d_x = torch.empty_like(self._x)
        with space.in_turn():
            space.load(self, self._stored, self._loop.lr)
            space.load_fast(self._last)
            for total in (*space.totals, space.d_rows):
                total.zero_()
            for mine, g in zip(space.d_rows, d_rows, strict=True):
                if g is not None:
                    mine[:, mine.shape[1] - g.shape[1] :] = g
            along = any(g is not None for g in d_fast)
            for mine, g in zip(space.d_fast, d_fast, strict=True):
                mine.zero_() if g is None else mine.copy_(g)
            for index in reversed(range(len(self._parts))):
                part = self._parts[index]
                space.d_nll.zero_() if d_nll is None else space.d_nll.copy_(d_nll[:, part])
                with stage("inner step back"):
                    self._back(index, along)
                d_x[:, part] = space.d_x
                along = not self._loop.is_cut(index)
            before = space.d_rows[:, :, space.d_rows.shape[2] - self._known_rows :].clone()
            kinds = [t.dtype for t in tensors(self._stored)]
            totals = [t.to(kind, copy=True) for t, kind in zip(space.totals, kinds, strict=True)]
            first = [t.clone() if along else None for t in space.d_fast]
        return [d_x, *before.unbind(), *totals, *first]

    def _read(self, index: int) -> None:
        """Takes step `index` for the first time."""
        space, part = self._space, self._parts[index]
        seen = self._bring(index)
        kind = "learn and keep" if self._goes_back else "learn"
        space.run(space.lanes.main, (kind, seen), partial(self._learn, seen))
        self._rows[:, :, self._in_rows(part)] = space.rows[:, :, -self._loop.config.mini_batch_size :]
        for mine, theirs in ((self._nll, space.nll), (self._slope, space.slope), (self._lse, space.lse)):
            mine[:, part] = theirs
        self._loop.norms.append(space.norm.clone())
        if self._goes_back:
            self._kept.append((space.kept.clone(), space.rate.clone()))

    def _back(self, index: int, along: bool) -> None:
        """Takes step `index` back; `along`: something comes back through the fast weights after it."""
        space, part = self._space, self._parts[index]
        seen = self._bring(index)
        kept, rate = self._kept.pop()
        space.kept.copy_(kept)
        space.rate.copy_(rate)
        if self._loop.ops.takes_known:
            for mine, theirs in ((self._nll, space.nll), (self._slope, space.slope), (self._lse, space.lse)):
                theirs.copy_(mine[:, part])
        space.run(space.lanes.main, ("back", seen, along), partial(self._take_back, seen, along))

    def _bring(self, index: int) -> int:
        """Brings in what step `index` is given, both ways; returns how many earlier tokens it sees."""
        loop, space, part = self._loop, self._space, self._parts[index]
        rows = self._in_rows(part)
        seen = limit(loop.config.window, rows.start)
        own = loop.config.mini_batch_size
        space.x.copy_(self._x[:, part])
        space.positions.copy_(loop.positions[part])
        space.targets.copy_(loop.targets[:, part])
        space.rows[:, :, space.rows.shape[2] - own - seen : -own] = self._rows[
            :, :, rows.start - seen : rows.start
        ]
        return seen

    def _learn(self, seen: int) -> None:
        loop, space = self._loop, self._space
        ops, config, fast = loop.ops, loop.config, space.fast
        own = space.rows.shape[2] - config.mini_batch_size
        caches = [FixedRows(*pair, own, own - seen) for pair in by_cache(space.rows.unbind())]
        arguments = (space.x, space.positions, space.targets, caches)
        read = inner_forward(ops, config, space.weights, fast, *arguments)
        for mine, theirs in ((space.nll, read.nll), (space.slope, read.slope), (space.lse, read.lse)):
            mine.copy_(theirs)
        kept: list[Factors] | None = [] if self._goes_back else None
        grads = inner_gradient(ops, config, space.weights, fast, read, space.targets, kept)
        for parts, factors in zip(space.factors, reversed(kept or ()), strict=False):
            for part, factor in zip(parts, factors, strict=True):
                assert part is not None
                assert factor is not None
                part.copy_(factor)
        space.norm.copy_(inner_update_(ops, config, fast, grads, space.lr))
        space.rate.copy_(space.lr * scale_of(space.norm, config.inner_clip or None)[0])

    def _take_back(self, seen: int, along: bool) -> None:
        loop, space = self._loop, self._space
        ops, config, masters = loop.ops, loop.config, flat(space.fast.masters)
        blocks = zip(space.factors, space.fast.masters, strict=True)
        grads = [g for block in blocks for g in ops.mlp_gradients(*block)]
        for w, g in zip(masters, grads, strict=True):
            w.addcmul_(g, space.rate[:, None, None].to(w.dtype))
        size, own = space.rows.shape[2], config.mini_batch_size
        earlier = slice(size - own - seen, size - own)
        step = Step(
            space.x, space.positions, space.targets, [t[:, earlier] for t in space.rows.unbind()],
            Before(space.fast.masters, grads), [space.nll, space.slope, space.lse] if ops.takes_known else [],
        )  # fmt: skip
        found = step_back(
            ops, config, mapped(space.weights, leaf), space.lr, step, space.d_nll,
            space.d_fast if along else [None] * len(masters), [t[:, size - own :] for t in space.d_rows.unbind()],
        )  # fmt: skip
        space.d_x.copy_(found.x)
        for mine, d_fast in zip(space.d_fast, found.fast, strict=True):
            mine.add_(d_fast) if along else mine.copy_(d_fast)
        for mine, d_slow in zip(space.totals, found.slow, strict=True):
            if d_slow is not None:
                mine.add_(d_slow)
        for mine, d_past in zip(space.d_rows.unbind(), found.past, strict=True):
            _step_on(mine, d_past, own)

    def _in_rows(self, part: slice) -> slice:
        return slice(part.start + self._known_rows, part.stop + self._known_rows)


def _step_on(sums: Tensor, d_past: Tensor, own: int) -> None:
    """From a mini-batch's cotangents of keys or values to those of the one before, which ends where this one began.

    Args:
        sums: (B, W - 1 + b, H, D), of this mini-batch's rows last.
        d_past: (B, n, H, D), what is to be added to those of the n rows before.
        own: b.

    Rows further back than those n are left: they are zeros still where a mini-batch before sees as many rows, and
    nobody reads them again where it sees fewer.
    """
    end = sums.shape[1]
    first = end - d_past.shape[1]
    # From the last to the first: rows come to where those have gone from that were there.
    for stop in range(end, first, -own):
        start = max(first, stop - own)
        torch.add(
            sums[:, start - own : stop - own],
            d_past[:, start - first : stop - first],
            out=sums[:, start:stop],
        )
