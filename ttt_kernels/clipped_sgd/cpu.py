"""Clipped SGD on the C++ kernels of csrc/cpu/clipped_sgd.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels.clipped_sgd.reference import Tensors, d_new, inverse_norm, scale_of
from ttt_kernels.extension import dtype_code, kernels

_BLOCK = 8192
"""Elements that the kernel sums at a time (kBlock in csrc/cpu/clipped_sgd.cpp)."""


def _rows(t: Tensor) -> Tensor:
    """(B, n) with unit stride in n; copies only where a sequence's elements are not contiguous."""
    rows = t.reshape(t.shape[0], t.shape[1:].numel())
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _dots(a: Tensors, b: Tensors | None) -> Tensor:
    """Inner products per sequence over all tensors, (2, B) float64: of a with itself, and of a with b."""
    sums = torch.zeros(2, a[0].shape[0], dtype=torch.float64, device="cpu")
    for i, x in enumerate(a):
        y = b[i] if b is not None else None
        if x.numel():
            scratch = torch.empty(2, x.shape[0], -(-x.shape[1] // _BLOCK), dtype=torch.float64, device="cpu")
            kernels().clipped_sgd_dots(
                dtype_code(x.dtype), x.data_ptr(), x.stride(0), y.data_ptr() if y is not None else 0,
                y.stride(0) if y is not None else 0, scratch.data_ptr(), sums.data_ptr(), *x.shape,
            )  # fmt: skip
    return sums


def _combine(
    a: Tensor,
    of_a: Tensor,
    b: Tensor,
    of_b: Tensor,
    out: Tensor,
    copy: Tensor | None = None,
    active: Tensor | None = None,
) -> None:
    """out = of_a a + of_b b with one float64 factor per row, and its copy."""
    copied = copy if copy is not None else out
    if a.numel():
        kernels().clipped_sgd_combine(
            dtype_code(a.dtype), a.data_ptr(), a.stride(0), of_a.data_ptr(), b.data_ptr(), b.stride(0),
            of_b.data_ptr(), active.data_ptr() if active is not None else 0, out.data_ptr(), out.stride(0),
            dtype_code(copied.dtype), copied.data_ptr() if copy is not None else 0, copied.stride(0),
            *a.shape,
        )  # fmt: skip


def _step(
    weights: Tensors,
    grads: Tensors,
    lr: Tensor,
    max_norm: float | None,
    out: Tensors,
    copies: Tensors | None,
    active: Tensor | None,
) -> Tensor:
    rows = [_rows(g) for g in grads]
    norm = _dots(rows, None)[0].sqrt()
    factor = -lr.to(norm.dtype) * scale_of(norm, max_norm)[0]
    one = torch.ones_like(norm)
    for i, (w, g) in enumerate(zip(weights, rows, strict=True)):
        copy = copies[i].view(g.shape) if copies else None
        _combine(_rows(w), one, g, factor, out[i].view(g.shape), copy, active)
    return norm.to(weights[0].dtype if weights[0].dtype == torch.float64 else torch.float32)


def forward(
    weights: Tensors, grads: Tensors, lr: Tensor, max_norm: float | None, copy_dtype: torch.dtype | None
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """As `reference.forward`."""
    new = [w.new_empty(w.shape) for w in weights]
    copies = [] if copy_dtype is None else [w.new_empty(w.shape, dtype=copy_dtype) for w in weights]
    norm = _step(weights, grads, lr, max_norm, new, copies, None)
    return new, norm, copies


def backward(
    d_weights: Tensors,
    d_norm: Tensor,
    d_copies: Tensors,
    weights: Tensors,
    grads: Tensors,
    lr: Tensor,
    max_norm: float | None,
    copy_dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> tuple[list[Tensor] | None, list[Tensor] | None, Tensor | None]:
    """As `reference.backward`."""
    cotangents = d_new(d_weights, d_copies)
    rows, d_rows = [_rows(g) for g in grads], [_rows(c) for c in cotangents]
    square, product = _dots(rows, d_rows)
    norm = square.sqrt()
    inverse = inverse_norm(norm)
    scale, clips = scale_of(norm, max_norm)
    d_grads = None
    if needs[1]:
        of_l = -lr.to(norm.dtype) * scale
        of_g = torch.where(clips, -of_l * product * inverse.square(), 0) + d_norm.to(norm.dtype) * inverse
        d_grads = [g.new_empty(g.shape) for g in grads]
        for d_row, row, d_grad in zip(d_rows, rows, d_grads, strict=True):
            _combine(d_row, of_l, row, of_g, d_grad.view(row.shape))
    d_lr = -(scale * product).sum().to(lr) if needs[2] else None
    return cotangents if needs[0] else None, d_grads, d_lr


def update_(
    weights: Tensors,
    grads: Tensors,
    lr: Tensor,
    max_norm: float | None,
    copies: Tensors | None,
    active: Tensor | None,
) -> Tensor:
    """As `reference.update_`; the elements of a sequence are contiguous in weights and copies."""
    return _step(weights, grads, lr, max_norm, weights, copies, active)
