"""A stretch of a sequence read through all blocks, so that its losses can be differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine import slabs, through_time
from engine.blocks import prefix_forward
from engine.caches import RecordedCache, by_cache, last_rows
from engine.config import TTTConfig
from engine.ops import Ops
from engine.profiling import stage
from engine.through_time import Loop
from engine.weights import Fast, Weights, converted, suffix_of


class Read(NamedTuple):
    """What a stretch of T tokens gives; everything but `norms` and `inner_grads` is differentiable.

    nll: (B, T) in nats. fast: the fast weights after its last step. rows: those of its keys and values (B, n, H, D)
    that later tokens may see, block by block. prefix_output: (B, T, d), hidden states after the blocks without fast
    weights. norms: (B,) of every inner gradient. inner_grads: of the first steps.
    """

    nll: Tensor
    fast: Fast
    rows: list[Tensor]
    prefix_output: Tensor
    norms: list[Tensor]
    inner_grads: list[Fast]


@dataclass(frozen=True)
class Reader:
    """How stretches are read.

    Attributes:
        lr: inner learning rate.
        truncate_steps, checkpoint_blocks, keep_inner_grads: as in `engine.loss.loss`.
    """

    ops: Ops
    config: TTTConfig
    lr: float
    truncate_steps: int | None
    checkpoint_blocks: bool
    keep_inner_grads: int

    def read(
        self, weights: Weights, tokens: Tensor, start: int, past: Sequence[Tensor], masters: Fast
    ) -> Read:
        """Reads tokens (B, T + 1), whose first stands at position `start`.

        Args:
            weights: as stored.
            past: keys and values (B, n, H, D) of the tokens before, block by block.
            masters: the fast weights that the tokens before have led to.
        """
        x, rows = self.prefix(weights, tokens[:, :-1], start, past)
        loop = self.loop(weights, tokens, start)
        nll, fast, suffix_rows = through_time.run(loop, x, masters, past[len(rows) :])
        return Read(nll, fast, rows + suffix_rows, x, loop.norms, loop.inner_grads)

    def loop(self, weights: Weights, tokens: Tensor, start: int) -> Loop:
        """The inner loop over tokens (B, T + 1)."""
        done = start // self.config.mini_batch_size
        return Loop(
            self.ops, self.config, suffix_of(weights), _positions(tokens[:, 1:], start), tokens[:, 1:], self.lr, done,
            self.truncate_steps, max(0, self.keep_inner_grads - done),
        )  # fmt: skip

    def prefix(
        self, weights: Weights, tokens: Tensor, start: int, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states (B, T, d) of tokens (B, T) after the blocks without fast weights, and these blocks' `rows`.

        Arguments are those of `read`. With `checkpoint_blocks` a graph keeps of the blocks their inputs only.
        """
        ops, config = self.ops, self.config
        positions = _positions(tokens, start)
        pairs = by_cache(past)[: config.prefix_layers]
        with stage("prefix"):
            x = torch.nn.functional.embedding(tokens, weights.embed).to(config.torch_dtype)
            if self.checkpoint_blocks:
                rows = []
                for w, pair in zip(weights.prefix, pairs, strict=True):
                    x, k, v = slabs.run(ops, config, w, x, positions, pair)
                    rows += [k, v]
                return x, rows
            caches = [RecordedCache(*pair) for pair in pairs]
            blocks = [converted(w, config.torch_dtype) for w in weights.prefix]
            x = prefix_forward(ops, blocks, x, positions, caches, config.window)
            return x, [last_rows([t], config.window) for cache in caches for t in cache.own]


def _positions(tokens: Tensor, start: int) -> Tensor:
    return torch.arange(start, start + tokens.shape[1], device=tokens.device)
