"""The meta-objective: the mean pre-update loss over a sequence's mini-batches, differentiable through them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from engine import checks, recorded, snapshots
from engine.caches import no_rows
from engine.inner import learning_rate, masked_mean
from engine.ops import Ops
from engine.stretch import Reader
from engine.weights import Fast, initial_fast, stored

if TYPE_CHECKING:
    from engine.model import TTTModel

Method = Literal["snapshots", "rollback", "graph"]
METHODS: tuple[Method, ...] = ("rollback", "snapshots", "graph")
DEFAULT_METHOD: Method = "rollback"
DEFAULT_SNAPSHOT_EVERY = 16


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
    snapshot_every: int = DEFAULT_SNAPSHOT_EVERY,
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
    targets = tokens[:, 1:]
    weights = stored(model)
    lr = learning_rate(config, step)
    ops = Ops(model, backend)
    reader = Reader(ops, config, lr, truncate_steps, checkpoint_blocks, keep_inner_grads)
    nothing = no_rows(config, tokens)
    if not config.suffix_layers:
        x, _ = reader.prefix(weights, tokens[:, :-1], 0, nothing)
        hidden, _ = ops.norm(x, weights.final_norm)
        nll = ops.nll(hidden, weights.head.to(config.torch_dtype), targets)
        norms = nll.new_empty(len(tokens), 0)
        return LossOutput(masked_mean(nll, targets, config).mean(), nll, (), norms, [], x)

    masters = initial_fast(model, len(tokens))
    if method == "graph":
        read = recorded.run(reader, weights, tokens, masters)
    elif method == "snapshots" and targets.shape[1] > snapshot_every * config.mini_batch_size:
        read = snapshots.run(reader, weights, tokens, masters, snapshot_every)
    else:
        read = reader.read(weights, tokens, 0, nothing, masters)
    # (B, steps, b): a mini-batch counts as much as another, whatever it has of targets that count.
    shape = (len(tokens), -1, config.mini_batch_size)
    mean = masked_mean(read.nll.view(shape), targets.reshape(shape), config).mean()
    norms = torch.stack(read.norms, 1)
    return LossOutput(mean, read.nll, read.fast, norms, read.inner_grads, read.prefix_output)


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
