"""RMSNorm over the last dimension."""

import torch
from torch import Tensor

from ttt_kernels import checks, tangents
from ttt_kernels.backends import refuse_on_cpu
from ttt_kernels.jvp import twin
from ttt_kernels.registry import Operator
from ttt_kernels.rms_norm import cpu, reference, triton


def _fake(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide)


operator = Operator(
    name="rms_norm",
    inputs={"x": "Tensor", "weight": "Tensor", "residual": "Tensor?"},
    params={"eps": "float"},
    outputs={"y": "Tensor"},
    saved={"rstd": "Tensor"},
    differentiable=("x", "weight", "residual"),
    fake=_fake,
    kernels={
        "reference": {
            "forward": reference.forward,
            "backward": reference.backward,
            "double_backward": reference.double_backward,
        },
        "cpu": {"forward": cpu.forward, "backward": cpu.backward, "double_backward": cpu.double_backward},
        "triton": {
            "forward": triton.forward,
            "backward": triton.backward,
            "double_backward": triton.double_backward,
        },
    },
    refusals={"cpu": refuse_on_cpu, "triton": triton.refuse},
)
jvp_operator = twin(operator, own={"triton": {"backward": triton.jvp_backward}})


def check(name: str, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> None:
    """Checks the arguments of a norm, for the error messages of `name`."""
    given = {"x": x, "weight": weight} | ({} if residual is None else {"residual": residual})
    checks.floating(name, **given)
    checks.same_device(name, **given)
    checks.weight_dtype(name, x, weight=weight)
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: weight has shape {checks.shape(weight)}; accepted is one dimension of x's last size, "
            f"x having shape {checks.shape(x)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{name}: residual has shape {checks.shape(residual)} and dtype {residual.dtype}; accepted are x's, "
            f"{checks.shape(x)} and {x.dtype}"
        )
    if eps < 0:
        raise ValueError(f"{name}: eps is {eps}; accepted are values of at least 0")


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Root mean square normalization over the last dimension: x (mean(x^2) + eps)^-1/2 weight.

    Args:
        x: (..., n), any floating dtype; computed in float32 (float64 for float64).
        weight: (n,), x's dtype, or float32 beside a bfloat16 or float16 x.
        eps: added to the mean square; positive or zero.
        residual: added to the norm before its only rounding, x's shape and dtype; None for nothing.
        backend: None for the best that can run, or a backend's name.

    Returns:
        x's shape and dtype. Differentiable twice with respect to x, weight and residual (any number of times on
        the reference backend).

    Raises:
        ValueError: an argument has an unsuitable shape, dtype or device, or the backend cannot serve it.
    """
    check("rms_norm", x, weight, residual, eps)
    chosen = operator.select(backend, x, weight, residual)
    return operator.forward(x, weight, residual, eps, backend=chosen)[0]


def rms_norm_jvp(
    x: Tensor,
    weight: Tensor,
    x_dot: Tensor | None = None,
    weight_dot: Tensor | None = None,
    residual_dot: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` and its directional derivative along the tangents of its arguments.

    Args:
        x, weight, eps, residual: as in `rms_norm`.
        x_dot, weight_dot, residual_dot: shape, dtype and device of their arguments; None is zero.
        backend: None for the best that can run, or a backend's name.

    Returns:
        Output and tangent, both of x's shape and dtype. Differentiable once in reverse with respect to all
        tensors (any number of times on the reference backend).

    Raises:
        ValueError: as `rms_norm`, or a tangent is not like its argument.
    """
    name = "rms_norm_jvp"
    check(name, x, weight, residual, eps)
    tangents.check(name, x=(x, x_dot), weight=(weight, weight_dot))
    if residual is None and residual_dot is not None:
        raise ValueError(f"{name}: residual_dot is given without residual; accepted is None")
    if residual is not None:
        tangents.check(name, residual=(residual, residual_dot))
    tensors = (x, weight, residual, x_dot, weight_dot, residual_dot)
    y, tangent, *_ = jvp_operator.forward(*tensors, eps, backend=jvp_operator.select(backend, *tensors))
    return y, tangent
