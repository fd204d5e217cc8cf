"""How the sweep back through the inner loop gets at the fast weights of every step: it rolls them backwards.

Kept all at once they would cost steps x weights. What a step changed is a sum over a mini-batch's tokens instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import TTTConfig
from engine.inner import InnerStep, by_block, flat
from engine.ops import Ops
from engine.weights import Fast
from ttt_kernels.clipped_sgd.reference import scale_of
from ttt_kernels.matmul import operand
from ttt_kernels.swiglu.reference import Factors


def factor_bytes(config: TTTConfig, device: torch.device) -> int:
    """What a step of one sequence keeps for the sweep back."""
    dtype = operand(torch.empty(0, dtype=config.torch_dtype, device=device)).dtype
    per_token = 2 * config.hidden_size + 3 * config.intermediate_size
    return config.suffix_layers * config.mini_batch_size * per_token * dtype.itemsize


class Before(NamedTuple):
    """What a step started from: the fp32 weights, and their gradients before clipping, block by block."""

    masters: Fast
    grads: list[Tensor]


class Rollback:
    """Rolls the weights backwards, W_t = W_{t+1} + lr clip(g_t), by the factors of every step's gradient.

    g_t is a sum over the b tokens of a mini-batch of products of two vectors: b (2 d + 3 i) numbers a block in the
    compute dtype, where its weights have 3 d i in fp32. The products are those of the step itself, bit for bit, so
    that the weights come back to the rounding of one addition a step.
    """

    def __init__(self, ops: Ops, lr: float, clip: float) -> None:
        self._ops = ops
        self._lr = lr
        self._clip = clip
        self._steps: list[tuple[list[Factors], Tensor]] = []
        self._weights: Fast = ()

    def keep(self, step: InnerStep, factors: list[Factors]) -> None:
        """Takes note of a step, from first to last; `factors` of its gradient, last block first."""
        rate = self._lr * scale_of(step.norm, self._clip or None)[0]
        self._steps.append((factors[::-1], rate))
        self._weights = step.fast.masters

    def before(self) -> Before:
        """What the last step of which this was not asked yet started from."""
        factors, rate = self._steps.pop()
        weights = flat(self._weights)
        blocks = zip(factors, self._weights, strict=True)
        grads = [g for block in blocks for g in self._ops.mlp_gradients(*block)]
        back = [
            torch.addcmul(w, g, rate[:, None, None].to(w.dtype)) for w, g in zip(weights, grads, strict=True)
        ]
        self._weights = by_block(back)
        return Before(self._weights, grads)
