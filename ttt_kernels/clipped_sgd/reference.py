"""A step of SGD clipped by the global norm of every sequence, its gradient and its gradient's gradient.

Per sequence, over the whole tuple of weights W and gradients g, with learning rate eta and threshold c:
n = |g|, s = c / n where n >= c and 1 elsewhere, new = W - eta s g.

Derivatives are taken on the side of the threshold where n stands (at n = c: the clipped one), and that of n
is 0 at g = 0, where a norm has none.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _summed(t: Tensor) -> Tensor:
    """The type that products are summed in: float64, where squares of float32 neither overflow nor vanish."""
    return t.float() if t.device.type == "mps" else t.double()


def _dot(a: Tensors, b: Tensors) -> Tensor:
    """Inner product per sequence over all tensors, (B,)."""
    products = [_summed(x) * _summed(y) for x, y in zip(a, b, strict=True)]
    return torch.stack([p.reshape(p.shape[0], math.prod(p.shape[1:])).sum(1) for p in products]).sum(0)


def _each(factor: Tensor, like: Tensor) -> Tensor:
    """A factor per sequence, shaped to multiply `like` in its computing type."""
    return factor.to(_wide(like).dtype).reshape(-1, *[1] * (like.dim() - 1))


def _norm(grads: Tensors) -> Tensor:
    square = _dot(grads, grads)
    zero = square == 0
    # The root of zero has an infinite slope, which a mask behind it would turn into NaN.
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())


def scale_of(norm: Tensor, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """The factor s, and where it clips. A NaN norm counts as clipped, so that it shows in every weight."""
    if max_norm is None:
        return torch.ones_like(norm), torch.zeros_like(norm, dtype=torch.bool)
    clips = ~(norm < max_norm)
    return torch.where(clips, max_norm / torch.where(clips, norm, 1), 1), clips


def inverse_norm(norm: Tensor) -> Tensor:
    """1 / n, and 0 at n = 0."""
    zero = norm == 0
    return torch.where(zero, 0, 1 / torch.where(zero, 1, norm))


def forward(
    weights: Tensors, grads: Tensors, lr: Tensor, max_norm: float | None, copy_dtype: torch.dtype | None
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Returns the new weights, n (B,) in float32 (float64 for float64), and copies of the new weights."""
    norm = _norm(grads)
    step = lr.to(norm.dtype) * scale_of(norm, max_norm)[0]
    new = [(_wide(w) - _each(step, g) * _wide(g)).to(w.dtype) for w, g in zip(weights, grads, strict=True)]
    copies = [] if copy_dtype is None else [w.to(copy_dtype, copy=True) for w in new]
    return new, norm.to(_wide(weights[0]).dtype), copies


def d_new(d_weights: Tensors, d_copies: Tensors) -> list[Tensor]:
    """Cotangents of the new weights: their own, and those of the copies."""
    if not d_copies:
        return [d.clone(memory_format=torch.contiguous_format) for d in d_weights]
    return [(_wide(d) + _wide(c)).to(d.dtype) for d, c in zip(d_weights, d_copies, strict=True)]


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
    """With l the cotangent of the new weights and m that of n:

    dW = l, d_eta = -sum over sequences of s <g, l>, and dg = -eta l + m g / n where nothing is clipped, else
    dg = -eta s (l - g <g, l> / n^2) + m g / n.
    """
    cotangents = d_new(d_weights, d_copies)
    norm = _norm(grads)
    inverse = inverse_norm(norm)
    scale, clips = scale_of(norm, max_norm)
    gl = _dot(grads, cotangents)
    d_grads = None
    if needs[1]:
        eta = lr.to(norm.dtype)
        of_l = -eta * scale
        of_g = torch.where(clips, eta * scale * gl * inverse.square(), 0) + d_norm.to(norm.dtype) * inverse
        d_grads = [
            (_each(of_l, g) * _wide(c) + _each(of_g, g) * _wide(g)).to(g.dtype)
            for c, g in zip(cotangents, grads, strict=True)
        ]
    d_lr = -(scale * gl).sum().to(lr) if needs[2] else None
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
    """Cotangents of l (for the new weights and for the copies), m, W (zero), g and eta.

    With A, G, r the cotangents of dW, dg, d_eta, the products a = <g, G>, b = <l, G>, h = <g, l>, and
    k = s / n^2 where clipped, else 0, the scalar to differentiate is

        <A, l> - eta (s b - k h a) + m a / n - r s h          with  ds/dg = -k g,  dk/dg = -3 k g / n^2.
    """
    cotangents = d_new(d_weights, d_copies)
    upper = list(g_grads) if g_grads is not None else [torch.zeros_like(g) for g in grads]
    norm = _norm(grads)
    inverse = inverse_norm(norm)
    s, clips = scale_of(norm, max_norm)
    k = torch.where(clips, s * inverse.square(), 0)
    eta, m = lr.to(norm.dtype), d_norm.to(norm.dtype)
    r = g_lr.to(norm.dtype) if g_lr is not None else torch.zeros_like(eta)
    a, b, h = _dot(grads, upper), _dot(cotangents, upper), _dot(grads, cotangents)

    to_l = None
    if needs[0] or needs[2]:
        of_upper, of_g = -eta * s, eta * k * a - r * s
        to_l = [
            _each(of_upper, g) * _wide(u) + _each(of_g, g) * _wide(g)
            for u, g in zip(upper, grads, strict=True)
        ]
        if g_weights is not None:
            to_l = [t + _wide(w) for t, w in zip(to_l, g_weights, strict=True)]
    to_g = None
    if needs[4]:
        of_l = eta * k * a - r * s
        of_upper = eta * k * h + m * inverse
        of_g = k * (eta * b - 3 * eta * h * a * inverse.square() + r * h) - m * a * inverse**3
        parts = [
            _each(of_l, g) * _wide(c) + _each(of_upper, g) * _wide(u) + _each(of_g, g) * _wide(g)
            for c, u, g in zip(cotangents, upper, grads, strict=True)
        ]
        to_g = [p.to(g.dtype) for p, g in zip(parts, grads, strict=True)]
    return (
        [t.to(d.dtype, copy=True) for t, d in zip(to_l, d_weights, strict=True)]
        if to_l and needs[0]
        else None,
        (a * inverse).to(d_norm.dtype) if needs[1] else None,
        [t.to(d.dtype) for t, d in zip(to_l, d_copies, strict=False)] if to_l and needs[2] else None,
        [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights] if needs[3] else None,
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
    """Writes the new weights over the old and into the copies; returns n (B,)."""
    new, norm, _ = forward(weights, grads, lr, max_norm, None)
    for i, (weight, value) in enumerate(zip(weights, new, strict=True)):
        if active is not None:
            value = torch.where(active.reshape(-1, *[1] * (value.dim() - 1)), value, weight)
        weight.copy_(value)
        if copies is not None:
            kept = slice(None) if active is None else active
            copies[i][kept] = value[kept].to(copies[i].dtype)
    return norm
