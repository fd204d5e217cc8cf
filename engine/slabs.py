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
from engine.caches import GrowingCache, first_seen, last_rows
from engine.config import TTTConfig
from engine.cotangents import RowCotangents, Totals, leaf, pulled
from engine.ops import Ops
from engine.weights import BlockWeights, converted, mapped, tensors

_UNBOUNDED = 2048
"""Tokens of a slab where attention has no window."""


@torch.compiler.disable(reason="its way back is no graph; method='graph' with checkpoint_blocks=False is one")
def run(
    ops: Ops,
    config: TTTConfig,
    weights: BlockWeights,
    x: Tensor,
    positions: Tensor,
    past: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, d) at `positions` (T,) through a block whose weights are given as stored.

    Args:
        past: keys and values (B, n, H, D) of the tokens before.

    Returns:
        The block's output, and those keys and values (B, n', H, D) of x that later tokens may see. Differentiable
        once with respect to x, `past` and the weights; a second time raises.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Node.apply(
        _Block(ops, config, weights, positions), x, *past, *tensors(weights)
    )
    return result


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: _Block, x: Tensor, k: Tensor, v: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, k, v, *weights)
        ctx.set_materialize_grads(False)
        ctx.block = block
        return block.forward(x, (k, v))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "engine: with checkpoint_blocks the gradient cannot itself be differentiated (create_graph=True)"
            )
        x, k, v, *_ = ctx.saved_tensors
        return None, *ctx.block.backward(x, (k, v), *cotangents)


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
    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        weights = converted(self._stored, self._config.torch_dtype)
        cache = GrowingCache(self._config.window, *past)
        y = torch.empty_like(x)
        k, v = (t[:, :0] for t in past)
        for part in self._parts:
            rows = project(self._ops, weights, x[:, part], self._positions[part])
            k, v = (last_rows(pair, self._config.window) for pair in ((k, rows.k), (v, rows.v)))
            y[:, part] = self._rest(weights, rows, *cache.extend(rows.k, rows.v))
        return y, k, v

    def backward(
        self,
        x: Tensor,
        given: tuple[Tensor, Tensor],
        dy: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
    ) -> list[Tensor | None]:
        """Cotangents of x, of the keys and values before it and of every weight."""
        weights = mapped(converted(self._stored, self._config.torch_dtype), leaf)
        totals = Totals(tensors(weights), [t.dtype for t in tensors(self._stored)])
        d_x = torch.empty_like(x)
        if dy is None:
            dy = torch.zeros_like(x)
        d_rows = RowCotangents(self._size)
        d_rows.add_last(x.shape[1], (dk, dv))
        slabs: dict[int, Projected] = {}
        for index in reversed(range(len(self._parts))):
            part = self._parts[index]
            start = first_seen(part.start, self._config.window, given[0].shape[1])
            first = max(0, start) // self._size
            for i in range(first, index + 1):
                if i not in slabs:
                    slabs[i] = self._projected(i, weights, x)
            before = [slabs[i] for i in range(first, index)]
            own = slabs.pop(index)
            past = [
                leaf(last_rows([earlier, *(getattr(slab, name) for slab in before)], self._config.window))
                for name, earlier in zip(("k", "v"), given, strict=True)
            ]
            with torch.enable_grad():
                seen = (torch.cat(pair, 1) for pair in zip(past, (own.k, own.v), strict=True))
                y = self._rest(weights, own, *seen)
            results = [(y, dy[:, part]), *zip((own.k, own.v), d_rows.pop(index, (own.k, own.v)), strict=True)]
            found = pulled(results, [own.x, *past, *totals.leaves])
            d_x[:, part] = found[0]
            d_rows.add(start, found[1:3])
            totals.add(found[3:])
        return [d_x, *d_rows.before(given), *totals.found]

    @torch.enable_grad()
    def _projected(self, index: int, weights: BlockWeights, x: Tensor) -> Projected:
        part = self._parts[index]
        return project(self._ops, weights, leaf(x[:, part]), self._positions[part])

    def _rest(self, weights: BlockWeights, rows: Projected, keys: Tensor, values: Tensor) -> Tensor:
        h, _ = attend(self._ops, weights, rows, keys, values, self._config.window, for_backward=False)
        return mlp_forward(self._ops, weights.mlp, weights.mlp.matrices, h)[0]
