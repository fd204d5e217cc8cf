"""A block without fast weights as one node of autograd, which goes through a sequence a slab of tokens at a time.

Forward keeps the block's input alone. The way back computes a slab's graph again, from the last slab to the first:
cotangents of keys and values wait for the slabs that they belong to, as in engine/through_time.py, and a slab's
queries, keys and values are computed once for itself and for those that see them. So nothing is computed twice on
the way back, and what is held beside inputs and gradients does not grow with the length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.blocks import Projected, attend, mlp_forward, project
from engine.config import TTTConfig
from engine.cotangents import RowCotangents, Totals, pulled
from engine.ops import Ops
from engine.recorded import GrowingCache
from engine.weights import BlockWeights, converted, mapped, tensors

_UNBOUNDED = 2048
"""Tokens of a slab where attention has no window."""


def run(ops: Ops, config: TTTConfig, weights: BlockWeights, x: Tensor, positions: Tensor) -> Tensor:
    """x (B, T, d) at `positions` (T,) through a block whose weights are given as stored.

    Differentiable once with respect to x and the weights; a second time raises.
    """
    result: Tensor = _Node.apply(_Block(ops, config, weights, positions), x, *tensors(weights))
    return result


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: _Block, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.block = block
        return block.forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "engine: with checkpoint_blocks the gradient cannot itself be differentiated (create_graph=True)"
            )
        x, *_ = ctx.saved_tensors
        return None, *ctx.block.backward(x, dy)


class _Block:
    def __init__(self, ops: Ops, config: TTTConfig, weights: BlockWeights, positions: Tensor) -> None:
        self._ops = ops
        self._config = config
        self._stored = mapped(weights, Tensor.detach)
        self._positions = positions
        # A window's worth, so that no more than a slab and the one before it are needed at once.
        self._size = max(config.mini_batch_size, config.window or _UNBOUNDED)
        self._parts = [
            slice(start, min(start + self._size, len(positions)))
            for start in range(0, len(positions), self._size)
        ]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        weights = converted(self._stored, self._config.torch_dtype)
        cache = GrowingCache(self._config.window)
        y = torch.empty_like(x)
        for part in self._parts:
            rows = project(self._ops, weights, x[:, part], self._positions[part])
            y[:, part] = self._rest(weights, rows, *cache.extend(rows.k, rows.v))
        return y

    def backward(self, x: Tensor, dy: Tensor) -> list[Tensor | None]:
        """Cotangents of x and of every weight."""
        weights = mapped(converted(self._stored, self._config.torch_dtype), _leaf)
        totals = Totals(tensors(weights), [t.dtype for t in tensors(self._stored)])
        d_x = torch.empty_like(x)
        d_rows = RowCotangents(self._size)
        slabs: dict[int, Projected] = {}
        for index in reversed(range(len(self._parts))):
            part, window = self._parts[index], self._config.window
            start = 0 if window is None else max(0, part.start - window + 1)
            first = start // self._size
            for i in range(first, index + 1):
                if i not in slabs:
                    slabs[i] = self._projected(i, weights, x)
            before = [slabs[i] for i in range(first, index)]
            own = slabs.pop(index)
            past = [
                _last([getattr(slab, name) for slab in before], part.start - start, like=getattr(own, name))
                for name in ("k", "v")
            ]
            with torch.enable_grad():
                seen = (torch.cat(pair, 1) for pair in zip(past, (own.k, own.v), strict=True))
                y = self._rest(weights, own, *seen)
            results = [(y, dy[:, part]), *zip((own.k, own.v), d_rows.pop(index, 2), strict=True)]
            found = pulled(results, [own.x, *past, *totals.leaves])
            d_x[:, part] = found[0]
            d_rows.add(start, found[1:3])
            totals.add(found[3:])
        return [d_x, *totals.found]

    @torch.enable_grad()
    def _projected(self, index: int, weights: BlockWeights, x: Tensor) -> Projected:
        part = self._parts[index]
        return project(self._ops, weights, _leaf(x[:, part]), self._positions[part])

    def _rest(self, weights: BlockWeights, rows: Projected, keys: Tensor, values: Tensor) -> Tensor:
        h, _ = attend(self._ops, weights, rows, keys, values, self._config.window, for_backward=False)
        return mlp_forward(self._ops, weights.mlp, weights.mlp.matrices, h)[0]


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def _last(slabs: list[Tensor], length: int, like: Tensor) -> Tensor:
    """The last `length` rows of slabs, none of which may be there, as a leaf."""
    whole = torch.cat([t.detach() for t in (*slabs, like[:, :0])], 1)
    return _leaf(whole[:, whole.shape[1] - length :])
