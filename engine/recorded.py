"""The inner loop as a graph of all its steps: what automatic differentiation does by itself.

Its memory grows with everything that is computed, but nothing is computed twice, and on the reference backend it
differentiates to any order. The oracle of engine/through_time.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.caches import GrowingCache, by_cache, no_rows
from engine.inner import FastWeights, by_block, flat, inner_step
from engine.profiling import stage
from engine.stretch import Read, Reader
from engine.weights import Fast, Weights, converted


def run(reader: Reader, weights: Weights, tokens: Tensor, masters: Fast) -> Read:
    """Reads tokens (B, T + 1) from their first on; there are no `rows`."""
    config = reader.config
    past = no_rows(config, tokens)
    x, _ = reader.prefix(weights, tokens[:, :-1], 0, past)
    loop = reader.loop(weights, tokens, 0)
    suffix = converted(loop.weights, config.torch_dtype)
    fast = FastWeights.of(masters, config)
    caches = [GrowingCache(config.window, *pair) for pair in by_cache(past[2 * config.prefix_layers :])]
    nlls = []
    for index, part in enumerate(loop.parts):
        if loop.is_cut(index):
            fast = FastWeights.of(by_block([t.detach() for t in flat(fast.masters)]), config)
        with stage("inner step"):
            step = inner_step(
                loop.ops, config, suffix, fast, x[:, part], loop.positions[part], loop.targets[:, part], caches,
                loop.lr,
            )  # fmt: skip
        loop.note(step)
        nlls.append(step.read.nll)
        fast = step.fast
    return Read(torch.cat(nlls, 1), fast.masters, [], x, loop.norms, loop.inner_grads)
