"""Cross-entropy of a linear layer, its gradient and its gradient's gradient, by blocks of the vocabulary.

Forward, per row of x with target t: l = W x, lse = log sum exp(l), nll = lse - l_t; 0 where t is ignored.
P = exp(l - lse) are the probabilities and Y the one-hot targets.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels.linear_ce import targets
from ttt_kernels.linear_ce.blocks import blocks
from ttt_kernels.matmul import mm
from ttt_kernels.tangents import product, total


def compute_dtype(x: Tensor) -> torch.dtype:
    """What logits, statistics and losses are held in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def own_column(values: Tensor, own: Tensor) -> Tensor:
    """Of each row of a block (N, cols), the value at the target's place `own`; 0 where that is elsewhere."""
    inside = (own >= 0) & (own < values.shape[1])
    found = values.gather(1, own.clamp(0, values.shape[1] - 1)[:, None])[:, 0]
    return torch.where(inside, found, torch.zeros_like(found))


def _one_hot(own: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    return (own[:, None] == torch.arange(classes, device=own.device)).to(dtype)


def forward(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, keep_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns nll and lse, (N,) in float32 or float64, for x (N, d), weight (V, d) and target (N,).

    And where it is to be kept the slope, (N, d) in the same type: the gradient of a row's nll in that row of x,
    P W - W_t; else a tensor without elements.
    """
    lse, picked = [], []
    for block in blocks(x.shape[0], weight.shape[0], x.device):
        logits = mm(x, weight[block].mT, compute_dtype(x))
        lse.append(torch.logsumexp(logits, 1))
        picked.append(own_column(logits, target - block.start))
    whole = torch.logsumexp(torch.stack(lse), 0)
    nll = targets.losses(whole - torch.stack(picked).sum(0), target, weight.shape[0], ignore_index)
    if not keep_slope:
        return nll, whole, whole.new_empty(0)
    slope = x.new_zeros(x.shape, dtype=whole.dtype)
    counts = (target != ignore_index)[:, None]
    for block in blocks(x.shape[0], weight.shape[0], x.device):
        w = weight[block]
        p = torch.exp(mm(x, w.mT, whole.dtype) - whole[:, None])
        off = counts * (p - _one_hot(target - block.start, w.shape[0], p.dtype))
        slope = slope + mm(off.to(x.dtype), w, whole.dtype)
    return nll, whole, slope


def logits_tangent(
    x: Tensor, weight: Tensor, t_x: Tensor | None, t_weight: Tensor | None, block: slice, dtype: torch.dtype
) -> Tensor:
    """l^ = t_x W^T + x t_weight^T of a block's classes, (N, cols)."""
    along = total(
        product(t_x, weight[block].mT, dtype),
        None if t_weight is None else mm(x, t_weight[block].mT, dtype),
    )
    return x.new_zeros(x.shape[0], block.stop - block.start, dtype=dtype) if along is None else along


def backward(
    d_nll: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    slope: Tensor,
    ignore_index: int,
    keep_slope: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dl = d_nll (P - Y), dx = dl W, dW = dl^T x."""
    d = torch.where(target == ignore_index, torch.zeros_like(d_nll), d_nll)[:, None]
    dx, dw = None, []
    for block in blocks(x.shape[0], weight.shape[0], x.device):
        w = weight[block]
        p = torch.exp(mm(x, w.mT, lse.dtype) - lse[:, None])
        d_logits = (d * (p - _one_hot(target - block.start, w.shape[0], p.dtype))).to(x.dtype)
        if needs[0]:
            dx = total(dx, mm(d_logits, w, lse.dtype))
        if needs[1]:
            dw.append(mm(d_logits.mT, x, weight.dtype))
    return None if dx is None else dx.to(x.dtype), torch.cat(dw) if needs[1] else None


def double_backward(
    g_x: Tensor | None,
    g_weight: Tensor | None,
    d_nll: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    slope: Tensor,
    ignore_index: int,
    keep_slope: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Cotangents of d_nll, x and W, given those of dx (a) and dW (b).

    With l^ = a W^T + x b^T, the tangent of the logits, <dx, a> + <dW, b> = sum d_nll (r - l^_t) where
    r = sum over classes of P l^. So d_nll's cotangent is r - l^_t, that of l^ is dl, and that of l is
    q = d_nll P (l^ - r): x's is q W + dl b and W's is q^T x + dl^T a. One sweep for r, one for the rest.
    """
    ignored = target == ignore_index
    d = torch.where(ignored, torch.zeros_like(d_nll), d_nll)[:, None]

    def probabilities_and_tangent(block: slice) -> tuple[Tensor, Tensor]:
        p = torch.exp(mm(x, weight[block].mT, lse.dtype) - lse[:, None])
        return p, logits_tangent(x, weight, g_x, g_weight, block, lse.dtype)

    mean, picked = torch.zeros_like(lse), torch.zeros_like(lse)
    for block in blocks(x.shape[0], weight.shape[0], x.device):
        p, along = probabilities_and_tangent(block)
        mean = mean + (p * along).sum(1)
        picked = picked + own_column(along, target - block.start)
    to_d_nll = torch.where(ignored, torch.zeros_like(mean), mean - picked)

    to_x, to_weight = None, []
    for block in blocks(x.shape[0], weight.shape[0], x.device) if any(needs[1:]) else ():
        p, along = probabilities_and_tangent(block)
        w, g_w = weight[block], None if g_weight is None else g_weight[block]
        q = (d * p * (along - mean[:, None])).to(x.dtype)
        d_logits = (d * (p - _one_hot(target - block.start, w.shape[0], p.dtype))).to(x.dtype)
        if needs[1]:
            to_x = total(to_x, mm(q, w, lse.dtype), product(d_logits, g_w, lse.dtype))
        if needs[2]:
            to_weight.append(total(mm(q.mT, x, weight.dtype), product(d_logits.mT, g_x, weight.dtype)))
    return (
        to_d_nll.to(d_nll.dtype) if needs[0] else None,
        None if to_x is None else to_x.to(x.dtype),
        torch.cat(to_weight) if needs[2] else None,
    )


def slope_forward(
    x: Tensor, weight: Tensor, target: Tensor, known: Sequence[Tensor], ignore_index: int, of_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns nll (N,), the slope (N, d) and lse (N,), from their formulas whatever is known."""
    nll, lse, slope = forward(x, weight, target, ignore_index, True)
    return nll, slope if of_slope else slope.detach(), lse


def slope_backward(
    d_nll: Tensor,
    d_slope: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    known: Sequence[Tensor],
    slope: Tensor,
    lse: Tensor,
    ignore_index: int,
    of_slope: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Cotangents of x and W: those of the losses by `backward`, those of the slope by `double_backward`."""
    given = (x, weight, target, lse, slope, ignore_index, True)
    first = backward(d_nll, *given, needs)
    if not of_slope:
        return first
    second = double_backward(d_slope.to(x.dtype), None, torch.ones_like(d_nll), *given, (False, *needs))[1:]
    to_x, to_weight = (None if a is None else total(a, b) for a, b in zip(first, second, strict=True))
    return to_x, to_weight
