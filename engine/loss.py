"""The meta-objective: the mean pre-update loss over a sequence's mini-batches, differentiable through them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from engine import checks
from engine.blocks import prefix_forward
from engine.inner import (
    FastWeights,
    by_block,
    inner_step,
    learning_rate,
    masked_mean,
)
from engine.ops import Ops
from engine.profiling import stage
from engine.weights import Fast, Weights, collect, initial_fast

if TYPE_CHECKING:
    from engine.model import TTTModel


class LossOutput(NamedTuple):
    """What `TTTModel.loss` gives; everything but `inner_grads` and `inner_norms` is differentiable.

    loss: 0-dim. nll: (B, T), unmasked, in nats. fast: the fast weights after the last step. inner_norms:
    (B, T / b) norms before clipping. inner_grads: those of the first steps, as many as were asked for.
    prefix_output: (B, T, d), hidden states after the blocks without fast weights.
    """

    loss: Tensor
    nll: Tensor
    fast: Fast
    inner_norms: Tensor
    inner_grads: list[Fast]
    prefix_output: Tensor


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


def loss(
    model: TTTModel,
    tokens: Tensor,
    step: int | None = None,
    backend: str | None = None,
    keep_inner_grads: int = 0,
) -> LossOutput:
    """Mean over mini-batches of the masked mean loss before each inner step; see `TTTModel.loss`.

    Args:
        tokens: (B, T + 1) int64, T a multiple of the mini-batch size (any T without fast weights).
        step: outer training step, for the warm-up of the inner rate; None in evaluation.
        keep_inner_grads: of how many first steps the inner gradients are returned.

    Raises:
        ValueError: unsuitable tokens, a negative step, or a backend that cannot serve.
    """
    config = model.config
    checks.tokens("loss", tokens, config, model.final_norm.device)
    length = tokens.shape[1] - 1
    if length < 1 or (config.suffix_layers and length % config.mini_batch_size):
        raise ValueError(
            f"loss: tokens has shape {tuple(tokens.shape)}; accepted is (B, T + 1) with T a positive multiple of "
            f"the mini-batch size {config.mini_batch_size}"
        )
    if step is not None and step < 0:
        raise ValueError(f"loss: step is {step}; accepted are None and integers of at least 0")
    tokens = tokens.long()
    ops = Ops(model, backend)
    weights = collect(model)
    targets = tokens[:, 1:]
    positions = torch.arange(length, device=tokens.device)
    x = torch.nn.functional.embedding(tokens[:, :-1], weights.embed)
    with stage("prefix"):
        caches = [GrowingCache(config.window) for _ in weights.prefix]
        x = prefix_forward(ops, weights.prefix, x, positions, caches, config.window)
    if not config.suffix_layers:
        hidden, _ = ops.norm(x, weights.final_norm)
        nll, _ = ops.nll(hidden, weights.head, targets)
        norms = nll.new_empty(len(tokens), 0)
        return LossOutput(masked_mean(nll, targets, config).mean(), nll, (), norms, [], x)
    return _inner_loop(
        model, ops, weights, x, positions, targets, learning_rate(config, step), keep_inner_grads
    )


def _inner_loop(
    model: TTTModel,
    ops: Ops,
    weights: Weights,
    x: Tensor,
    positions: Tensor,
    targets: Tensor,
    lr: float,
    keep_inner_grads: int,
) -> LossOutput:
    config = model.config
    size = config.mini_batch_size
    fast = FastWeights.of(initial_fast(model, len(targets)), config)
    caches = [GrowingCache(config.window) for _ in weights.suffix]
    nlls, norms, losses = [], [], []
    kept: list[Fast] = []
    for start in range(0, targets.shape[1], size):
        part = slice(start, start + size)
        known = targets[:, part]
        with stage("inner step"):
            step = inner_step(ops, config, weights, fast, x[:, part], positions[part], known, caches, lr)
        fast = step.fast
        nlls.append(step.nll)
        losses.append(masked_mean(step.nll, known, config).mean())
        norms.append(step.norm.detach())
        if len(kept) < keep_inner_grads:
            kept.append(by_block([g.detach() for g in step.grads]))
    return LossOutput(
        torch.stack(losses).mean(), torch.cat(nlls, 1), fast.masters, torch.stack(norms, 1), kept, x
    )
