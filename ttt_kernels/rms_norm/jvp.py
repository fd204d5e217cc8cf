"""RMSNorm with tangents beside its arguments."""

import torch
from torch import Tensor

from ttt_kernels import tangents
from ttt_kernels.backends import select
from ttt_kernels.rms_norm import check, reference


def rms_norm_jvp(
    x: Tensor,
    weight: Tensor,
    x_dot: Tensor | None = None,
    weight_dot: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x, weight)` and its derivative along the tangents.

    Args:
        x: (..., n), any floating dtype; computed in float32 (float64 for float64).
        weight: (n,), x's dtype, or float32 beside a bfloat16 or float16 x.
        x_dot: tangent of x, of its shape and dtype; None for zero.
        weight_dot: tangent of weight, of its shape and dtype; None for zero.
        eps: added to the mean square; positive or zero.
        backend: None or "reference".

    Returns:
        Output and tangent, both of x's shape and dtype, differentiable any number of times.

    Raises:
        ValueError: an argument has an unsuitable shape, dtype or device, or the backend cannot serve it.
    """
    check("rms_norm_jvp", x, weight, eps)
    tangents.check("rms_norm_jvp", x=(x, x_dot), weight=(weight, weight_dot))
    dots = (
        torch.zeros_like(x) if x_dot is None else x_dot,
        torch.zeros_like(weight) if weight_dot is None else weight_dot,
    )
    select("rms_norm_jvp", backend, (x, weight, *dots), {})
    y, y_dot = torch.func.jvp(lambda a, w: reference.forward(a, w, eps)[0], (x, weight), dots)[:2]
    return y, y_dot
