"""The inner loop as a graph of all its steps: what automatic differentiation does by itself.

Its memory grows with everything that is computed, but nothing is computed twice, and on the reference backend it
differentiates to any order. The oracle of engine/through_time.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.inner import FastWeights, by_block, inner_step
from engine.profiling import stage
from engine.through_time import Loop
from engine.weights import Fast, converted


class GrowingCache:
    """Keys and values as a graph needs them: never written in place, those outside the window dropped."""

    def __init__(self, window: int | None) -> None:
        self._window = window
        self._past: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `engine.blocks.Cache`."""
        if self._past is not None:
            k, v = torch.cat((self._past[0], k), 1), torch.cat((self._past[1], v), 1)
        start = 0 if self._window is None else max(0, k.shape[1] - self._window + 1)
        self._past = (k[:, start:], v[:, start:])
        return k, v


def recorded(loop: Loop, x: Tensor, masters: Fast) -> tuple[Tensor, Fast]:
    """As `through_time.run`."""
    config = loop.config
    weights = converted(loop.weights, config.torch_dtype)
    fast = FastWeights.of(masters, config)
    caches = [GrowingCache(config.window) for _ in weights.suffix]
    nlls = []
    for index, part in enumerate(loop.parts):
        if loop.is_cut(index):
            fast = FastWeights.of(by_block([t.detach() for block in fast.masters for t in block]), config)
        with stage("inner step"):
            step = inner_step(
                loop.ops, config, weights, fast, x[:, part], loop.positions[part], loop.targets[:, part], caches,
                loop.lr,
            )  # fmt: skip
        loop.note(step)
        nlls.append(step.read.nll)
        fast = step.fast
    return torch.cat(nlls, 1), fast.masters
