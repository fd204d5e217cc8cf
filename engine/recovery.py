"""How the sweep back through the inner loop gets at the fast weights of every step.

Kept all at once they would cost steps x weights. Either some are kept and the others made again from those, or the
weights are rolled backwards by what every step changed, whose gradients are products of thin matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.config import TTTConfig
from engine.inner import FastWeights, InnerStep, by_block, flat
from engine.ops import Ops
from engine.weights import Fast
from ttt_kernels.clipped_sgd.reference import scale_of
from ttt_kernels.matmul import operand
from ttt_kernels.swiglu.reference import Factors


def bytes_per_step(config: TTTConfig, method: str, device: torch.device) -> int:
    """What a step of one sequence keeps for the sweep back: a snapshot of the fast weights, or a rollback's factors."""
    d, i, b = config.hidden_size, config.intermediate_size, config.mini_batch_size
    master = torch.promote_types(config.torch_dtype, torch.float32)
    factor = operand(torch.empty(0, dtype=config.torch_dtype, device=device)).dtype
    per_block = {"snapshots": 3 * d * i * master.itemsize, "rollback": b * (2 * d + 3 * i) * factor.itemsize}
    return config.suffix_layers * per_block[method]


Again = Callable[[int, Fast], Fast]


class Before(NamedTuple):
    """What a step started from: the fp32 weights, and their gradients if they were needed to get there.

    grads: block by block (gate, up, down), in the weights' dtype, before clipping.
    """

    masters: Fast
    grads: list[Tensor] | None


class Recovery(Protocol):
    """Remembers the steps of a sweep forward, from first to last, and gives their weights back, last to first."""

    wants_factors: bool
    """Whether `keep` needs the factors of a step's gradients."""

    def keep(self, index: int, before: FastWeights, step: InnerStep, factors: list[Factors]) -> None:
        """Takes note of step `index`."""

    def before(self, index: int, again: Again) -> Before:
        """What step `index` started from; every index once, in falling order.

        `again(index, weights)` takes step `index` once more and gives the weights after it.
        """


class Nothing:
    """Of a sweep that nobody takes back."""

    wants_factors = False

    def keep(self, index: int, before: FastWeights, step: InnerStep, factors: list[Factors]) -> None:
        """See `Recovery`."""

    def before(self, index: int, again: Again) -> Before:
        """See `Recovery`."""
        raise RuntimeError("engine: this sweep was made without gradients")


class Snapshots:
    """Keeps the weights before every `every`-th step; those between are made again, a stretch at a time.

    Memory: steps / every + every - 1 times the fast weights. With `every` 1 no step is taken twice.
    """

    wants_factors = False

    def __init__(self, every: int) -> None:
        self._every = every
        self._kept: dict[int, Fast] = {}

    def keep(self, index: int, before: FastWeights, step: InnerStep, factors: list[Factors]) -> None:
        """See `Recovery`."""
        if index % self._every == 0:
            self._kept[index] = before.masters

    def before(self, index: int, again: Again) -> Before:
        """See `Recovery`."""
        if index not in self._kept:
            for i in range(index - index % self._every, index):
                self._kept[i + 1] = again(i, self._kept[i])
        return Before(self._kept.pop(index), None)


class Rollback:
    """Rolls the weights backwards, W_t = W_{t+1} + lr clip(g_t), by the factors of every step's gradient.

    g_t is a sum over the b tokens of a mini-batch of products of two vectors: b (2 d + 3 i) numbers a block in the
    compute dtype, where its weights have 3 d i in fp32. The products are those of the step itself, bit for bit, so
    that the weights come back to the rounding of one addition a step.
    """

    wants_factors = True

    def __init__(self, ops: Ops, lr: float, clip: float) -> None:
        self._ops = ops
        self._lr = lr
        self._clip = clip
        self._steps: list[tuple[list[Factors], Tensor]] = []
        self._weights: Fast = ()
        self._like: Fast = ()

    def keep(self, index: int, before: FastWeights, step: InnerStep, factors: list[Factors]) -> None:
        """See `Recovery`."""
        rate = self._lr * scale_of(step.norm, self._clip or None)[0]
        self._steps.append((factors[::-1], rate))
        self._weights = step.fast.masters
        if not self._like:
            # Of what the products read only shapes and dtypes are needed.
            self._like = by_block([t.to("meta") for t in flat(before.copies)])

    def before(self, index: int, again: Again) -> Before:
        """See `Recovery`."""
        assert index == len(self._steps) - 1
        factors, rate = self._steps.pop()
        weights = flat(self._weights)
        products = [
            g for block in zip(factors, self._like, strict=True) for g in self._ops.mlp_gradients(*block)
        ]
        grads = [g.to(w.dtype) for g, w in zip(products, weights, strict=True)]
        back = [
            torch.addcmul(w, g, rate[:, None, None].to(w.dtype)) for w, g in zip(weights, grads, strict=True)
        ]
        self._weights = by_block(back)
        return Before(self._weights, grads)
