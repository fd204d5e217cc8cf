"""Clipped SGD on the C++ kernels of csrc/cpu/clipped_sgd.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels.clipped_sgd.reference import Tensors, d_new, inverse_norm
from ttt_kernels.clipped_sgd.rows import rows_of
from ttt_kernels.extension import addresses, beyond_caches, dtype_code, kernels, located

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


def _clips(square: Tensor, max_norm: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of sums of squares (B,), which are contiguous: the norm, the factor s, and where it clips."""
    norm, scale = torch.empty_like(square), torch.empty_like(square)
    clips = torch.empty_like(square, dtype=torch.bool)
    kernels().clipped_sgd_clips(
        *addresses(square), max_norm or 0.0, *addresses(norm, scale, clips), len(square)
    )
    return norm, scale, clips


class _Sum:
    """A weighted sum of the new weights' inputs w, l, u and g, the same for every tensor of the tuple.

    Attributes:
        factors: (4, B) float64, one for each sequence; 0 where there is no such input.
        uses: bit k is set where input k has a factor.
    """

    def __init__(self, *factors: Tensor | None) -> None:
        like = next(f for f in factors if f is not None)
        self.factors = torch.stack([torch.zeros_like(like) if f is None else f for f in factors])
        self.uses = sum(1 << k for k, f in enumerate(factors) if f is not None)


def _combine(
    inputs: Sequence[Tensors | None],
    results: Sequence[tuple[_Sum, Tensors]],
    copies: Tensors | None = None,
    active: Tensor | None = None,
) -> None:
    """Writes one or two sums of w, l, u and g (`inputs`, rows), and copies of the first."""
    factors = torch.cat([total.factors for total, _ in results])
    uses, uses_more = [total.uses for total, _ in results] + [0] * (2 - len(results))
    past = beyond_caches(*(t for _, tensors in results for t in tensors), *(copies or ()))
    for i in range(len(results[0][1])):
        out, more = [tensors[i] for _, tensors in results] + [None] * (2 - len(results))
        copy = copies[i] if copies else None
        assert out is not None
        if out.numel():
            # Views: a copy's results would be lost.
            rows = [None if t is None else t.view(len(t), t[0].numel()) for t in (out, more, copy)]
            given = [n for t in inputs for n in located(None if t is None else t[i])]
            kernels().clipped_sgd_combine(
                dtype_code(out.dtype), *given, factors.data_ptr(), uses, uses_more,
                *addresses(active), *located(rows[0]), *located(rows[1]),
                dtype_code((out if copy is None else copy).dtype), *located(rows[2]), past,
                out.shape[0], out.shape[1:].numel(),
            )  # fmt: skip


def _rows(tensors: Tensors | None) -> list[Tensor] | None:
    return None if tensors is None else [rows_of(t) for t in tensors]


def _like(tensors: Tensors) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors]


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
    norm, scale, _ = _clips(_dots(rows)[0], max_norm)
    step = -lr.to(norm.dtype) * scale
    new = _Sum(torch.ones_like(norm), None, None, step)
    _combine((_rows(weights), None, None, rows), [(new, out)], copies, active)
    return norm.to(weights[0].dtype if weights[0].dtype == torch.float64 else torch.float32)


def forward(
    weights: Tensors, grads: Tensors, lr: Tensor, max_norm: float | None, copy_dtype: torch.dtype | None
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """As `reference.forward`."""
    new = _like(weights)
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
    # Without copies the cotangents are what was given, of which the result has to be a copy.
    cotangents = d_new(d_weights, d_copies) if d_copies else d_weights
    rows, d_rows = _rows(grads), _rows(cotangents)
    assert rows is not None
    square, product, _, _ = _dots(rows, d_rows)
    norm, scale, clips = _clips(square, max_norm)
    inverse = inverse_norm(norm)
    results: list[tuple[_Sum, list[Tensor]]] = []
    d_grads = _like(grads) if needs[1] else None
    if d_grads is not None:
        of_l = -lr.to(norm.dtype) * scale
        of_g = torch.where(clips, -of_l * product * inverse.square(), 0) + d_norm.to(norm.dtype) * inverse
        results.append((_Sum(None, of_l, None, of_g), d_grads))
    to_weights = None
    if needs[0]:
        to_weights = list(cotangents) if d_copies else _like(weights)
        if not d_copies:
            results.append((_Sum(None, torch.ones_like(norm), None, None), to_weights))
    if results:
        _combine((None, d_rows, None, rows), results)
    d_lr = -(scale * product).sum().to(lr) if needs[2] else None
    return to_weights, d_grads, d_lr


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
    rows, l_rows = _rows(grads), _rows(d_new(d_weights, d_copies) if d_copies else d_weights)
    u_rows = _rows(g_grads)
    assert rows is not None
    square, h, a, b = _dots(rows, l_rows, u_rows)
    norm, s, clips = _clips(square, max_norm)
    inverse = inverse_norm(norm)
    k = torch.where(clips, s * inverse.square(), 0)
    eta, m = lr.to(norm.dtype), d_norm.to(norm.dtype)
    r = g_lr.to(norm.dtype) if g_lr is not None else torch.zeros_like(eta)

    results: list[tuple[_Sum, list[Tensor]]] = []
    to_l = _like(grads) if needs[0] or needs[2] else None
    if to_l is not None:
        of_w = None if g_weights is None else torch.ones_like(norm)
        of_upper = None if g_grads is None else -eta * s
        results.append((_Sum(of_w, None, of_upper, eta * k * a - r * s), to_l))
    to_g = _like(grads) if needs[4] else None
    if to_g is not None:
        of_g = k * (eta * b - 3 * eta * h * a * inverse.square() + r * h) - m * a * inverse**3
        of_l = eta * k * a - r * s
        of_upper = None if g_grads is None else eta * k * h + m * inverse
        results.append((_Sum(None, of_l, of_upper, of_g), to_g))
    if results:
        _combine((_rows(g_weights), l_rows, u_rows, rows), results)
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
