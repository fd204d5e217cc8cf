"""The inner step of test-time training: one mini-batch from hidden states to new fast weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.blocks import Cache, SuffixTape, suffix_backward, suffix_forward
from engine.config import TTTConfig
from engine.ops import IGNORED, Ops
from engine.weights import Fast, SuffixWeights
from ttt_kernels.swiglu.reference import Factors


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

    nll: (B, b) unmasked, 0 where the target is not known yet. slope: (B, b, d), the gradient of each nll in its row
    of hidden. lse: (B, b), log-sum-exp of the logits. hidden: (B, b, d), outputs of the final norm. The rest is what
    the backward needs.
    """

    nll: Tensor
    slope: Tensor
    lse: Tensor
    hidden: Tensor
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


def shares(targets: Tensor, config: TTTConfig, dtype: torch.dtype) -> Tensor:
    """Each target's weight (B, T) in the mean over the counted ones of its sequence; 0 without any."""
    counts = counted(targets, config).to(dtype)
    return counts / counts.sum(-1, keepdim=True).clamp_min(1.0)


def masked_mean(nll: Tensor, targets: Tensor, config: TTTConfig) -> Tensor:
    """Mean over the counted targets of each sequence, (B,); 0 without any."""
    counts = counted(targets, config)
    return (nll * counts).sum(-1) / counts.sum(-1).clamp_min(1.0)


def inner_forward(
    ops: Ops,
    config: TTTConfig,
    weights: SuffixWeights,
    fast: FastWeights,
    x: Tensor,
    positions: Tensor,
    targets: Tensor,
    caches: Sequence[Cache],
    known: Sequence[Tensor] = (),
    *,
    learns: bool = True,
) -> Forward:
    """Reads one mini-batch through the suffix blocks and the head.

    Args:
        x: (B, b, d), the prefix blocks' outputs.
        positions: (b,) int64.
        targets: (B, b) int64, the next tokens; `IGNORED` where one has not arrived yet.
        caches: keys and values of the mini-batches before, one per suffix block; extended by this one.
        known: nll, slope and lse where the same mini-batch was read before, which spares the head's products.
        learns: whether `inner_gradient` follows; without it the slope is a constant.
    """
    out, tapes = suffix_forward(ops, weights.suffix, fast.copies, x, positions, caches, config.window)
    hidden, rstd = ops.norm(out, weights.final_norm)
    nll, slope, lse = ops.nll_and_slope(hidden, weights.head, targets, known, of_slope=learns)
    return Forward(nll, slope, lse, hidden, out, rstd, tapes)


def with_last_target(ops: Ops, weights: SuffixWeights, read: Forward, target: Tensor) -> Forward:
    """`read` with the target (B,) of its last token, which was not known yet; builds no graph."""
    last = ops.nll_and_slope(read.hidden[:, -1:], weights.head, target[:, None])
    nll, slope, lse = (torch.cat((a[:, :-1], b), 1) for a, b in zip(read[:3], last, strict=True))
    return read._replace(nll=nll, slope=slope, lse=lse)


def inner_gradient(
    ops: Ops,
    config: TTTConfig,
    weights: SuffixWeights,
    fast: FastWeights,
    read: Forward,
    targets: Tensor,
    kept: list[Factors] | None = None,
) -> list[Tensor]:
    """Gradient of the masked mean of a mini-batch's next-token losses, for each sequence its own.

    `kept` takes the factors of the gradients, last block first; only where no graph is built.

    Returns:
        Those of all fast matrices in the masters' dtype, block by block (gate, up, down), (B, ...) each.
        Differentiable with respect to everything where a graph is recorded.
    """
    share = shares(targets, config, read.slope.dtype)
    d_hidden = (read.slope * share[..., None]).to(read.hidden.dtype)
    d_out = ops.norm_backward(d_hidden, read.out, weights.final_norm, read.rstd)
    return suffix_backward(
        ops, weights.suffix, fast.copies, fast.masters, read.tapes, d_out, config.window, kept
    )


def inner_update(
    ops: Ops, config: TTTConfig, fast: FastWeights, grads: Sequence[Tensor], lr: float | Tensor
) -> tuple[FastWeights, Tensor]:
    """The clipped SGD step of the paper's section 2: new fast weights, and the gradient's norm (B,) before it."""
    copy_dtype = None if config.torch_dtype == grads[0].dtype else config.torch_dtype
    new, norm, copies = ops.update(flat(fast.masters), grads, lr, config.inner_clip, copy_dtype)
    masters = by_block(new)
    return FastWeights(masters, by_block(copies) if copies else masters), norm


class InnerStep(NamedTuple):
    """One mini-batch read and learnt from.

    read: what it gave before the step. fast: the weights after it. grads: those of all fast matrices, block by
    block (gate, up, down), before clipping. norm: (B,) of grads.
    """

    read: Forward
    fast: FastWeights
    grads: list[Tensor]
    norm: Tensor


def inner_step(
    ops: Ops,
    config: TTTConfig,
    weights: SuffixWeights,
    fast: FastWeights,
    x: Tensor,
    positions: Tensor,
    targets: Tensor,
    caches: Sequence[Cache],
    lr: float,
    kept: list[Factors] | None = None,
) -> InnerStep:
    """From the prefix blocks' outputs (B, b, d) to new fast weights.

    Arguments are those of `inner_forward`, `inner_gradient` and `inner_update`.

    Of all weights only the fast ones' gradients are computed, and no hidden state's below the first fast MLP. Beside
    its results it holds the intermediates of this mini-batch. Where a graph is recorded it is differentiable with
    respect to everything.
    """
    read = inner_forward(ops, config, weights, fast, x, positions, targets, caches)
    grads = inner_gradient(ops, config, weights, fast, read, targets, kept)
    new, norm = inner_update(ops, config, fast, grads, lr)
    return InnerStep(read, new, grads, norm)


def inner_update_(
    ops: Ops, config: TTTConfig, fast: FastWeights, grads: Sequence[Tensor], lr: float | Tensor
) -> Tensor:
    """`inner_update` in place, where nothing records; returns the gradient's norm (B,)."""
    copies = None if fast.copies is fast.masters else flat(fast.copies)
    return ops.update_(flat(fast.masters), grads, lr, config.inner_clip, copies)


def flat(fast: Fast) -> list[Tensor]:
    """Block by block: gate, up, down."""
    return [t for block in fast for t in block]


def by_block(tensors: Sequence[Tensor]) -> Fast:
    """The inverse of `flat`."""
    return tuple((tensors[i], tensors[i + 1], tensors[i + 2]) for i in range(0, len(tensors), 3))
