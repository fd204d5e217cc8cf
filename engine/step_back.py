"""One step of the inner loop taken back: a function of tensors, whoever brings them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.caches import RecordedCache, by_cache
from engine.config import TTTConfig
from engine.cotangents import leaf, pulled
from engine.inner import FastWeights, by_block, flat, inner_forward, inner_update
from engine.ops import Ops
from engine.rollback import Before
from engine.tangents import loss_along
from engine.weights import SuffixWeights, tensors
from ttt_kernels.tangents import total


class Step(NamedTuple):
    """What a step was given.

    x: (B, b, d). positions: (b,). targets: (B, b). past: keys and values (B, n, H, D) of earlier tokens, block by
    block. before: the fp32 fast weights that it started from, and their gradients. known: nll, slope and lse of its
    tokens, or nothing where the backend cannot use them.
    """

    x: Tensor
    positions: Tensor
    targets: Tensor
    past: list[Tensor]
    before: Before
    known: list[Tensor]


class Cotangents(NamedTuple):
    """Those of a step's x, of the fast weights before it, of its `past` and of every slow weight; None is zero."""

    x: Tensor
    fast: list[Tensor | None]
    past: Sequence[Tensor]
    slow: Sequence[Tensor | None]


def step_back(
    ops: Ops,
    config: TTTConfig,
    weights: SuffixWeights,
    lr: float | Tensor,
    step: Step,
    d_nll: Tensor,
    d_fast: Sequence[Tensor | None],
    d_rows: Sequence[Tensor | None],
) -> Cotangents:
    """Cotangents of all that a step was given.

    Args:
        weights: leaves, in the compute dtype.
        lr: inner learning rate.
        d_nll: (B, b), the cotangents of its losses.
        d_fast: those of the fast weights after it.
        d_rows: those of its own keys and values (B, b, H, D), block by block.
    """
    x, fast, past = leaf(step.x), [leaf(t) for t in flat(step.before.masters)], [leaf(t) for t in step.past]
    caches = [RecordedCache(*pair) for pair in by_cache(past)]
    through: Sequence[Tensor | None] = [None] * len(fast)
    arguments = (x, step.positions, step.targets, caches, step.known)
    results: list[tuple[Tensor, Tensor | None]]
    if any(g is not None for g in d_fast):
        through, along = _update_back(ops, config, step.before, d_fast, lr)
        dots = by_block([t.to(config.torch_dtype) for t in along])
        with torch.enable_grad():
            now = FastWeights.of(by_block(fast), config)
            nll, change = loss_along(ops, config, weights, now, dots, *arguments)
        results = [(nll, d_nll), (change, torch.ones_like(change))]
    else:
        # Nothing comes back from the update: the mini-batch was only read.
        with torch.enable_grad():
            now = FastWeights.of(by_block(fast), config)
            read = inner_forward(ops, config, weights, now, *arguments, learns=False)
        results = [(read.nll, d_nll)]
    results += zip([t for cache in caches for t in cache.own], d_rows, strict=True)
    found = pulled(results, [x, *fast, *past, *tensors(weights)])
    first, last = 1 + len(fast), 1 + len(fast) + len(past)
    to_fast = [total(a, b) for a, b in zip(through, found[1:first], strict=True)]
    return Cotangents(found[0], to_fast, found[first:last], found[last:])


@torch.enable_grad()
def _update_back(
    ops: Ops, config: TTTConfig, before: Before, d_fast: Sequence[Tensor | None], lr: float | Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Takes a clipped update back: cotangents of the weights before it and of their gradients."""
    leaves = [leaf(t) for t in (*flat(before.masters), *before.grads)]
    count = len(before.grads)
    fast = FastWeights(by_block(leaves[:count]), by_block(leaves[:count]))
    new, _ = inner_update(ops, config, fast, leaves[count:], lr)
    found = pulled(zip(flat(new.masters), d_fast, strict=True), leaves, zeros=True)
    return found[:count], found[count:]
