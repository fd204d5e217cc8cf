"""The inner step of test-time training: one mini-batch from hidden states to new fast weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.blocks import Cache, SuffixTape, suffix_backward, suffix_forward
from engine.config import TTTConfig
from engine.ops import IGNORED, Ops
from engine.weights import Fast, Weights


class FastWeights(NamedTuple):
    """The fast weights of every suffix block: fp32 masters, and the copies in the compute dtype."""

    masters: Fast
    copies: Fast

    @classmethod
    def of(cls, masters: Fast, config: TTTConfig) -> FastWeights:
        """Copies are the masters themselves where the compute dtype is theirs."""
        dtype = config.torch_dtype
        if not masters or masters[0][0].dtype == dtype:
            return cls(masters, masters)
        return cls(masters, tuple((g.to(dtype), u.to(dtype), d.to(dtype)) for g, u, d in masters))


class Forward(NamedTuple):
    """A mini-batch read but not yet learnt from.

    nll: (B, b) unmasked, 0 where the target is not known yet. hidden: (B, b, d), outputs of the final norm.
    d_hidden: gradient of the sum of the counted nll. The rest is what the backward needs.
    """

    nll: Tensor
    hidden: Tensor
    d_hidden: Tensor
    out: Tensor
    rstd: Tensor
    tapes: list[SuffixTape]


def learning_rate(config: TTTConfig, step: int | None) -> float:
    """The inner rate at outer training step `step`; None: in evaluation, without warm-up."""
    if step is None or config.ilr_warmup_steps == 0:
        return config.inner_lr
    progress = min(1.0, (step + 1) / config.ilr_warmup_steps)
    return config.ilr_init + (config.inner_lr - config.ilr_init) * progress


def counted(targets: Tensor, config: TTTConfig) -> Tensor:
    """Which targets (B, T) count in the inner loss, as float32 zeros and ones."""
    counts = targets != IGNORED
    if config.bos_token_id is not None:
        counts &= targets != config.bos_token_id
    return counts.float()


def masked_mean(nll: Tensor, targets: Tensor, config: TTTConfig) -> Tensor:
    """Mean over the counted targets of each sequence, (B,); 0 without any."""
    counts = counted(targets, config)
    return (nll * counts).sum(-1) / counts.sum(-1).clamp_min(1.0)


def inner_forward(
    ops: Ops,
    config: TTTConfig,
    weights: Weights,
    fast: FastWeights,
    x: Tensor,
    positions: Tensor,
    targets: Tensor,
    caches: Sequence[Cache],
) -> Forward:
    """Reads one mini-batch through the suffix blocks and the head.

    Args:
        x: (B, b, d), the prefix blocks' outputs.
        positions: (b,) int64.
        targets: (B, b) int64, the next tokens; `IGNORED` where one has not arrived yet.
        caches: keys and values of the mini-batches before, one per suffix block; extended by this one.
    """
    out, tapes = suffix_forward(ops, weights.suffix, fast.copies, x, positions, caches, config.window)
    hidden, rstd = ops.norm(out, weights.final_norm)
    counts = counted(targets, config)
    nll, saved = ops.nll(hidden, weights.head, targets, for_backward=True)
    d_hidden = ops.nll_backward(counts.to(nll.dtype), hidden, weights.head, targets, saved)
    return Forward(nll, hidden, d_hidden, out, rstd, tapes)


def with_last_target(ops: Ops, config: TTTConfig, weights: Weights, read: Forward, target: Tensor) -> Forward:
    """`read` with the target (B,) of its last token, which was not known yet; builds no graph."""
    last = read.hidden[:, -1:]
    counts = counted(target[:, None], config)
    nll, saved = ops.nll(last, weights.head, target[:, None], for_backward=True)
    d_last = ops.nll_backward(counts, last, weights.head, target[:, None], saved)
    return read._replace(
        nll=torch.cat((read.nll[:, :-1], nll), 1), d_hidden=torch.cat((read.d_hidden[:, :-1], d_last), 1)
    )


def inner_gradient(
    ops: Ops, config: TTTConfig, weights: Weights, fast: FastWeights, read: Forward, targets: Tensor
) -> list[Tensor]:
    """Gradient of the masked mean of a mini-batch's next-token losses, for each sequence its own.

    Returns:
        Those of all fast matrices in the masters' dtype, block by block (gate, up, down), (B, ...) each.
        Differentiable with respect to everything where a graph is recorded.
    """
    wide = torch.promote_types(read.d_hidden.dtype, torch.float32)
    total = counted(targets, config).sum(-1).clamp_min(1.0).to(wide)
    d_hidden = read.d_hidden * (1.0 / total)[:, None, None].to(read.d_hidden.dtype)
    d_out = ops.norm_backward(d_hidden, read.out, weights.final_norm, read.rstd)
    grads = suffix_backward(ops, weights.suffix, fast.copies, read.tapes, d_out, config.window)
    return [g.to(m.dtype) for g, m in zip(grads, flat(fast.masters), strict=True)]


def inner_update(
    ops: Ops, config: TTTConfig, fast: FastWeights, grads: Sequence[Tensor], lr: float
) -> tuple[FastWeights, Tensor]:
    """The clipped SGD step of the paper's section 2: new fast weights, and the gradient's norm (B,) before it."""
    copy_dtype = None if config.torch_dtype == grads[0].dtype else config.torch_dtype
    new, norm, copies = ops.update(flat(fast.masters), grads, lr, config.inner_clip, copy_dtype)
    masters = by_block(new)
    return FastWeights(masters, by_block(copies) if copies else masters), norm


class InnerStep(NamedTuple):
    """One mini-batch read and learnt from.

    nll: (B, b) unmasked, from the weights before the step. fast: the weights after it. grads: those of all fast
    matrices, block by block (gate, up, down), before clipping. norm: (B,) of grads.
    """

    nll: Tensor
    fast: FastWeights
    grads: list[Tensor]
    norm: Tensor


def inner_step(
    ops: Ops,
    config: TTTConfig,
    weights: Weights,
    fast: FastWeights,
    x: Tensor,
    positions: Tensor,
    targets: Tensor,
    caches: Sequence[Cache],
    lr: float,
) -> InnerStep:
    """From the prefix blocks' outputs (B, b, d) to new fast weights; arguments as of `inner_forward`.

    Of all weights only the fast ones' gradients are computed, and no hidden state's below the first fast MLP. Beside
    its results it holds the intermediates of this mini-batch. Where a graph is recorded it is differentiable with
    respect to everything.
    """
    read = inner_forward(ops, config, weights, fast, x, positions, targets, caches)
    grads = inner_gradient(ops, config, weights, fast, read, targets)
    new, norm = inner_update(ops, config, fast, grads, lr)
    return InnerStep(read.nll, new, grads, norm)


def inner_update_(ops: Ops, config: TTTConfig, fast: FastWeights, grads: Sequence[Tensor], lr: float) -> None:
    """`inner_update` in place, where nothing records."""
    copies = None if fast.copies is fast.masters else flat(fast.copies)
    ops.update_(flat(fast.masters), grads, lr, config.inner_clip, copies)


def flat(fast: Fast) -> list[Tensor]:
    """Block by block: gate, up, down."""
    return [t for block in fast for t in block]


def by_block(tensors: Sequence[Tensor]) -> Fast:
    """The inverse of `flat`."""
    return tuple((tensors[i], tensors[i + 1], tensors[i + 2]) for i in range(0, len(tensors), 3))
