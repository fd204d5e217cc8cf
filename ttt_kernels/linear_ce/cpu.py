"""Cross-entropy of a linear layer: products by torch's BLAS into one reused buffer of logits, and between
them the C++ passes of csrc/cpu/linear_ce.cpp."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ttt_kernels.extension import compute_dtype, dtype_code, kernels
from ttt_kernels.linear_ce import targets
from ttt_kernels.linear_ce.blocks import block_size, blocks
from ttt_kernels.matmul import accumulate, operand


def _blocks(x: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first class, the block's weights as products read them, its logits (N, cols) in the product's dtype).

    The logits, and the weights where they are converted, are overwritten by the next block.
    """
    a = operand(x)
    size = block_size(x.shape[0], weight.shape[0])
    logits = a.new_empty(x.shape[0] * size)
    as_is = weight.dtype == x.dtype == a.dtype
    converted = None if as_is else a.new_empty(size, x.shape[1])
    for part in blocks(x.shape[0], weight.shape[0]):
        w = weight[part]
        if converted is not None:
            w = converted[: w.shape[0]].copy_(w.to(x.dtype))
        block = logits[: x.shape[0] * w.shape[0]].view(x.shape[0], w.shape[0])
        torch.mm(a, w.t(), out=block)
        yield part.start, w, block


def _online(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, acc: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """nll, the rows' maximal logits and their sums Z of e^(logit - maximum); acc, from 0, becomes Z P W."""
    targets.check(target, weight.shape[0], ignore_index)
    wide = compute_dtype(x.dtype)
    own = torch.where(target == ignore_index, -1, target)
    maximum = torch.full(target.shape, -torch.inf, dtype=wide)
    sums, picked = torch.zeros_like(maximum), torch.zeros_like(maximum)
    for first, w, logits in _blocks(x, weight):
        kernels().linear_ce_online(
            dtype_code(logits.dtype), logits.data_ptr(), *logits.shape, first, own.data_ptr(),
            maximum.data_ptr(), sums.data_ptr(), picked.data_ptr(),
            acc.data_ptr() if acc is not None else 0, x.shape[1],
        )  # fmt: skip
        if acc is not None:
            accumulate(acc, logits, w)
    # Two small terms: lse - picked would round at the size of the logits.
    nll = (maximum - picked + sums.log()).masked_fill_(own < 0, 0)
    return nll, maximum, sums


def forward(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    nll, maximum, sums = _online(x, weight, target, ignore_index, None)
    return nll, maximum + sums.log()


def backward(
    d_nll: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """As `reference.backward`; the logits are computed once more."""
    d = d_nll.masked_fill(target == ignore_index, 0).contiguous()
    own, lse, a = target.contiguous(), lse.contiguous(), operand(x)
    dx = torch.zeros(x.shape, dtype=d.dtype) if needs[0] else None
    dw = torch.empty(weight.shape, dtype=weight.dtype) if needs[1] else None
    for first, w, logits in _blocks(x, weight) if any(needs) else ():
        kernels().linear_ce_d_logits(
            dtype_code(logits.dtype), logits.data_ptr(), *logits.shape, first, own.data_ptr(), lse.data_ptr(),
            d.data_ptr(),
        )  # fmt: skip
        if dx is not None:
            accumulate(dx, logits, w)
        if dw is not None:
            rows = dw[first : first + w.shape[0]]
            if rows.dtype == logits.dtype:
                torch.mm(logits.t(), a, out=rows)
            else:
                rows.copy_(torch.mm(logits.t(), a))
    return None if dx is None else dx.to(x.dtype), dw


def nll_and_input_gradient(
    x: Tensor, weight: Tensor, target: Tensor, d_nll: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.nll_and_input_gradient`, in one sweep over the vocabulary: two products per block.

    Until a row's last block its probabilities are known up to a factor, so acc = sum e^(l - maximum) W is
    kept for the largest logit so far, and dx = d_nll (acc / Z - W_t).
    """
    acc = torch.zeros(x.shape, dtype=compute_dtype(x.dtype))
    nll, maximum, sums = _online(x, weight, target, ignore_index, acc)
    d = d_nll.masked_fill(target == ignore_index, 0)
    own_weight = weight[target.masked_fill(target == ignore_index, 0)].to(x.dtype)
    dx = acc.div_(sums[:, None]).sub_(own_weight).mul_(d[:, None])
    return nll, maximum + sums.log(), dx.to(x.dtype)
