"""One step of the inner loop taken back: a function of tensors, whoever brings them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.caches import RecordedCache, by_cache
from engine.config import TTTConfig
from engine.cotangents import leaf, pulled
from engine.inner import FastWeights, by_block, flat, inner_forward
from engine.ops import Ops
from engine.rollback import Before
from engine.tangents import loss_along
from engine.weights import SuffixWeights, tensors


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
    """Those of a step's x, of the fast weights before it, of its `past` and of every slow weight; None is zero.

    `fast` is what is to be added to the cotangents of the fast weights after it, which an update passes on as they are;
    in the dtype of the weights' copies.
    """

    x: Tensor
    fast: Sequence[Tensor]
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
    copies = FastWeights.of(step.before.masters, config).copies
    x, fast, past = leaf(step.x), [leaf(t) for t in flat(copies)], [leaf(t) for t in step.past]
    now = FastWeights(step.before.masters, by_block(fast))
    caches = [RecordedCache(*pair) for pair in by_cache(past)]
    arguments = (x, step.positions, step.targets, caches, step.known)
    results: list[tuple[Tensor, Tensor | None]]
    if any(g is not None for g in d_fast):
        along = _update_back(ops, config, step.before, d_fast, lr)
        dots = by_block([t.to(config.torch_dtype) for t in along])
        # As large as the fast weights, and no longer needed.
        del along
        with torch.enable_grad():
            nll, change = loss_along(ops, config, weights, now, dots, *arguments)
        results = [(nll, d_nll), (change, torch.ones_like(change))]
    else:
        # Nothing comes back from the update: the mini-batch was only read.
        with torch.enable_grad():
            read = inner_forward(ops, config, weights, now, *arguments, learns=False)
        results = [(read.nll, d_nll)]
    results += zip([t for cache in caches for t in cache.own], d_rows, strict=True)
    found = pulled(results, [x, *fast, *past, *tensors(weights)])
    first, last = 1 + len(fast), 1 + len(fast) + len(past)
    return Cotangents(found[0], found[1:first], found[first:last], found[last:])


def _update_back(
    ops: Ops, config: TTTConfig, before: Before, d_fast: Sequence[Tensor | None], lr: float | Tensor
) -> list[Tensor]:
    """Takes a clipped update back: cotangents of its gradients."""
    given = [torch.zeros_like(g) if d is None else d for d, g in zip(d_fast, before.grads, strict=True)]
    return ops.update_backward(given, before.grads, lr, config.inner_clip)
