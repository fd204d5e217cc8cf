"""RMSNorm, its gradient and its gradient's gradient, as formulas.

Forward, over the last dimension of n elements: r = (mean(x^2) + eps)^-1/2, h = x r, y = h w + z, where z is the
residual (0 where there is none).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _over_rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]).sum(0)


def forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y (x's shape and dtype) and r (x.shape[:-1], float32 or float64)."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rstd[..., None] * _wide(weight)
    return (y if residual is None else y + _wide(residual)).to(x.dtype), rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx = r (w dy - h mean(w dy h)), dw = sum over rows of dy h, dz = dy."""
    dy_, h = _wide(dy), _wide(x) * rstd[..., None]
    dh = dy_ * _wide(weight)
    dx = rstd[..., None] * (dh - h * (dh * h).mean(-1, keepdim=True)) if needs[0] else None
    dw = _over_rows(dy_ * h) if needs[1] else None
    return (
        dx.to(x.dtype) if dx is not None else None,
        dw.to(weight.dtype) if dw is not None else None,
        dy.clone(memory_format=torch.contiguous_format) if needs[2] else None,
    )


def double_backward(
    g_x: Tensor | None,
    g_weight: Tensor | None,
    g_residual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Cotangents of dy, x, w and z (zero), given those of dx (a), dw (b) and dz (added to dy's).

    With m = mean(w dy h) and the scalar <dx, a> + <dw, b>: h's cotangent c collects the three places where h
    stands, and x's is then the norm's own backward of c plus the part through r outside the bracket.
    """
    r, w = rstd[..., None], _wide(weight)
    dy_, h = _wide(dy), _wide(x) * r
    a = _wide(g_x) if g_x is not None else torch.zeros_like(h)
    b = _wide(g_weight) if g_weight is not None else torch.zeros_like(w)
    dh = dy_ * w
    m = (dh * h).mean(-1, keepdim=True)
    ah = (a * h).mean(-1, keepdim=True)
    to_dh = r * (a - h * ah)
    d_dy = None
    if needs[0]:
        d_dy = to_dh * w + b * h
        d_dy = d_dy if g_residual is None else d_dy + _wide(g_residual)
    d_w = _over_rows(to_dh * dy_) if needs[2] else None
    d_x = None
    if needs[1]:
        # <dx, a> = r (a.dh - n m ah) with n the row's length: through h, then through r (dr/dx = -r^2 h / n).
        c = b * dy_ - r * (m * a + ah * dh)
        bracket = (a * dh).mean(-1, keepdim=True) - m * ah
        d_x = r * (c - h * (c * h).mean(-1, keepdim=True)) - r * r * h * bracket
    return (
        d_dy.to(dy.dtype) if d_dy is not None else None,
        d_x.to(x.dtype) if d_x is not None else None,
        d_w.to(weight.dtype) if d_w is not None else None,
        torch.zeros_like(dy, memory_format=torch.contiguous_format) if needs[3] else None,
    )
