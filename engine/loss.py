"""The meta-objective: the mean pre-update loss over a sequence's mini-batches, differentiable through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from engine import checks, slabs
from engine.blocks import prefix_forward
from engine.config import TTTConfig
from engine.inner import learning_rate, masked_mean
from engine.ops import Ops
from engine.profiling import stage
from engine.recorded import recorded
from engine.recovery import Nothing, Recovery, Rollback, Snapshots
from engine.through_time import Loop, run
from engine.weights import (
    BlockWeights,
    Fast,
    converted,
    initial_fast,
    stored,
    suffix_of,
)

if TYPE_CHECKING:
    from engine.model import TTTModel

Method = Literal["snapshots", "rollback", "graph"]
METHODS: tuple[Method, ...] = ("rollback", "snapshots", "graph")
DEFAULT_METHOD: Method = "rollback"


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


def loss(
    model: TTTModel,
    tokens: Tensor,
    step: int | None = None,
    *,
    backend: str | None = None,
    method: Method = DEFAULT_METHOD,
    snapshot_every: int = 1,
    truncate_steps: int | None = None,
    checkpoint_blocks: bool = True,
    keep_inner_grads: int = 0,
) -> LossOutput:
    """Mean over mini-batches of the masked mean loss before each inner step; see `TTTModel.loss`.

    Args:
        keep_inner_grads: of how many first steps the inner gradients are returned.
    """
    config = model.config
    _check(model, tokens, step, method, snapshot_every, truncate_steps)
    tokens = tokens.long()
    ops = Ops(model, backend)
    weights = stored(model)
    targets = tokens[:, 1:]
    positions = torch.arange(targets.shape[1], device=tokens.device)
    x = torch.nn.functional.embedding(tokens[:, :-1], weights.embed).to(config.torch_dtype)
    with stage("prefix"):
        x = _prefix(ops, config, weights.prefix, x, positions, checkpoint_blocks)
    suffix = suffix_of(weights)
    if not config.suffix_layers:
        hidden, _ = ops.norm(x, suffix.final_norm)
        nll = ops.nll(hidden, suffix.head.to(config.torch_dtype), targets)
        norms = nll.new_empty(len(tokens), 0)
        return LossOutput(masked_mean(nll, targets, config).mean(), nll, (), norms, [], x)

    goes_back = torch.is_grad_enabled()

    def recovery() -> Recovery:
        if not goes_back:
            return Nothing()
        return Rollback(ops, lr, config.inner_clip) if method == "rollback" else Snapshots(snapshot_every)

    lr = learning_rate(config, step)
    masters = initial_fast(model, len(tokens))
    loop = Loop(ops, config, suffix, positions, targets, lr, recovery, truncate_steps, keep_inner_grads)
    nll, fast = recorded(loop, x, masters) if method == "graph" else run(loop, x, masters)
    # (B, steps, b): a mini-batch counts as much as another, whatever it has of targets that count.
    shape = (len(tokens), -1, config.mini_batch_size)
    mean = masked_mean(nll.view(shape), targets.reshape(shape), config).mean()
    return LossOutput(mean, nll, fast, torch.stack(loop.norms, 1), loop.inner_grads, x)


class _NoCache:
    """Of a sequence that is read whole there is nothing before."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `engine.blocks.Cache`."""
        return k, v


def _prefix(
    ops: Ops,
    config: TTTConfig,
    blocks: Sequence[BlockWeights],
    x: Tensor,
    positions: Tensor,
    checkpoint_blocks: bool,
) -> Tensor:
    """x (B, T, d) through blocks without fast weights; with `checkpoint_blocks` a graph keeps their inputs only."""
    if checkpoint_blocks:
        for w in blocks:
            x = slabs.run(ops, config, w, x, positions)
        return x
    caches = [_NoCache() for _ in blocks]
    read = [converted(w, config.torch_dtype) for w in blocks]
    return prefix_forward(ops, read, x, positions, caches, config.window)


def _check(
    model: TTTModel,
    tokens: Tensor,
    step: int | None,
    method: str,
    snapshot_every: int,
    truncate_steps: int | None,
) -> None:
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
    if method not in METHODS:
        raise ValueError(f"loss: method is {method!r}; accepted are {', '.join(METHODS)}")
    if snapshot_every < 1:
        raise ValueError(f"loss: snapshot_every is {snapshot_every}; accepted are integers of at least 1")
    if truncate_steps is not None and truncate_steps < 1:
        raise ValueError(
            f"loss: truncate_steps is {truncate_steps}; accepted are None and integers of at least 1"
        )
