"""Clipped SGD on the C++ kernels of csrc/cpu/clipped_sgd.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels.clipped_sgd.reference import Tensors, d_new, inverse_norm, scale_of
from ttt_kernels.clipped_sgd.rows import rows_of
from ttt_kernels.extension import dtype_code, kernels, located

_BLOCK = 8192
"""Elements that the kernel sums at a time (kBlock in csrc/cpu/clipped_sgd.cpp)."""


def _dots(g: Tensors, ell: Tensors | None = None, u: Tensors | None = None) -> Tensor:
    """Inner products per sequence over all tensors, (4, B) float64: g . g, g . l, g . u and l . u; 0 without."""
    sums = torch.zeros(4, g[0].shape[0], dtype=torch.float64, device="cpu")
    for i, x in enumerate(g):
        if x.numel():
            others = [None if t is None else t[i] for t in (ell, u)]
            scratch = torch.empty(4, x.shape[0], -(-x.shape[1] // _BLOCK), dtype=torch.float64, device="cpu")
            kernels().clipped_sgd_dots(
                dtype_code(x.dtype), *located(x), *located(others[0]), *located(others[1]),
                scratch.data_ptr(), sums.data_ptr(), *x.shape,
            )  # fmt: skip
    return sums


Term = tuple[Tensor, Tensor]
"""Rows, and one float64 factor for each."""


def _combine(
    a: Term, b: Term, c: Term | None, out: Tensor, copy: Tensor | None = None, active: Tensor | None = None
) -> None:
    """out = the sum of the terms, and its copy."""
    copied = copy if copy is not None else out
    if out.numel():
        # Bound to a name: a temporary would be freed before the kernel reads it.
        factors = [None if term is None else term[1].contiguous() for term in (a, b, c)]
        terms = [
            (*located(None if term is None else term[0]), 0 if factor is None else factor.data_ptr())
            for term, factor in zip((a, b, c), factors, strict=True)
        ]
        kernels().clipped_sgd_combine(
            dtype_code(out.dtype), *(n for term in terms for n in term),
            active.data_ptr() if active is not None else 0, *located(out),
            dtype_code(copied.dtype), *located(copy), *out.shape,
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
    rows = [rows_of(g) for g in grads]
    norm = _dots(rows)[0].sqrt()
    factor = -lr.to(norm.dtype) * scale_of(norm, max_norm)[0]
    one = torch.ones_like(norm)
    for i, (w, g) in enumerate(zip(weights, rows, strict=True)):
        copy = copies[i].view(g.shape) if copies else None
        _combine((rows_of(w), one), (g, factor), None, out[i].view(g.shape), copy, active)
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
    rows, d_rows = [rows_of(g) for g in grads], [rows_of(c) for c in cotangents]
    square, product, _, _ = _dots(rows, d_rows)
    norm = square.sqrt()
    inverse = inverse_norm(norm)
    scale, clips = scale_of(norm, max_norm)
    d_grads = None
    if needs[1]:
        of_l = -lr.to(norm.dtype) * scale
        of_g = torch.where(clips, -of_l * product * inverse.square(), 0) + d_norm.to(norm.dtype) * inverse
        d_grads = [g.new_empty(g.shape) for g in grads]
        for d_row, row, d_grad in zip(d_rows, rows, d_grads, strict=True):
            _combine((d_row, of_l), (row, of_g), None, d_grad.view(row.shape))
    d_lr = -(scale * product).sum().to(lr) if needs[2] else None
    return cotangents if needs[0] else None, d_grads, d_lr


def double_backward(
    g_weights: Tensors | None,
    g_grads: Tensors | None,
    g_lr: Tensor | None,
    d_weights: Tensors,
    d_norm: Tensor,
    d_copies: Tensors,
    weights: Tensors,
    grads: Tensors,
    lr: Tensor,
    max_norm: float | None,
    copy_dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> tuple[
    list[Tensor] | None,
    Tensor | None,
    list[Tensor] | None,
    list[Tensor] | None,
    list[Tensor] | None,
    Tensor | None,
]:
    """As `reference.double_backward`, letters as there."""
    rows, l_rows = [rows_of(g) for g in grads], [rows_of(c) for c in d_new(d_weights, d_copies)]
    u_rows = None if g_grads is None else [rows_of(u) for u in g_grads]
    square, h, a, b = _dots(rows, l_rows, u_rows)
    norm = square.sqrt()
    inverse = inverse_norm(norm)
    s, clips = scale_of(norm, max_norm)
    k = torch.where(clips, s * inverse.square(), 0)
    eta, m = lr.to(norm.dtype), d_norm.to(norm.dtype)
    r = g_lr.to(norm.dtype) if g_lr is not None else torch.zeros_like(eta)

    of_g, one = eta * k * a - r * s, torch.ones_like(norm)
    to_l = None
    if needs[0] or needs[2]:
        to_l = [g.new_empty(g.shape) for g in grads]
        for i, (row, out) in enumerate(zip(rows, to_l, strict=True)):
            direct = None if g_weights is None else (rows_of(g_weights[i]), one)
            upper = (row, torch.zeros_like(norm)) if u_rows is None else (u_rows[i], -eta * s)
            _combine((row, of_g), upper, direct, out.view(row.shape))
    to_g = None
    if needs[4]:
        of_upper = eta * k * h + m * inverse
        of_g = k * (eta * b - 3 * eta * h * a * inverse.square() + r * h) - m * a * inverse**3
        of_l = eta * k * a - r * s
        to_g = [g.new_empty(g.shape) for g in grads]
        for i, (row, out) in enumerate(zip(rows, to_g, strict=True)):
            third = None if u_rows is None else (u_rows[i], of_upper)
            _combine((row, of_g), (l_rows[i], of_l), third, out.view(row.shape))
    return (
        to_l if to_l and needs[0] else None,
        (a * inverse).to(d_norm.dtype) if needs[1] else None,
        [t.to(d.dtype, copy=True) for t, d in zip(to_l, d_copies, strict=False)]
        if to_l and needs[2]
        else None,
        [w.new_zeros(w.shape) for w in weights] if needs[3] else None,
        to_g,
        (k * h * a - s * b).sum().to(lr) if needs[5] else None,
    )


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
