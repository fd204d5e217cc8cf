"""RMSNorm over the last dimension."""

import torch
from torch import Tensor

from ttt_kernels import checks
from ttt_kernels.backends import refuse_on_cpu
from ttt_kernels.registry import Operator
from ttt_kernels.rms_norm import cpu, reference


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide)


operator = Operator(
    name="rms_norm",
    inputs={"x": "Tensor", "weight": "Tensor"},
    params={"eps": "float"},
    outputs={"y": "Tensor"},
    saved={"rstd": "Tensor"},
    differentiable=("x", "weight"),
    fake=_fake,
    kernels={
        "reference": {
            "forward": reference.forward,
            "backward": reference.backward,
            "double_backward": reference.double_backward,
        },
        "cpu": {"forward": cpu.forward, "backward": cpu.backward},
    },
    refusals={"cpu": refuse_on_cpu},
)


def check(name: str, x: Tensor, weight: Tensor, eps: float) -> None:
    """Checks the arguments of a norm, for the error messages of `name`."""
    checks.floating(name, x=x, weight=weight)
    checks.same_device(name, x=x, weight=weight)
    checks.weight_dtype(name, x, weight=weight)
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: weight has shape {checks.shape(weight)}; accepted is one dimension of x's last size, "
            f"x having shape {checks.shape(x)}"
        )
    if eps < 0:
        raise ValueError(f"{name}: eps is {eps}; accepted are values of at least 0")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """Root mean square normalization over the last dimension: x (mean(x^2) + eps)^-1/2 weight.

    Args:
        x: (..., n), any floating dtype; computed in float32 (float64 for float64).
        weight: (n,), x's dtype, or float32 beside a bfloat16 or float16 x.
        eps: added to the mean square; positive or zero.
        backend: None for the best that can run, or a backend's name.

    Returns:
        x's shape and dtype. Differentiable twice with respect to x and weight (any number of times on the
        reference backend).

    Raises:
        ValueError: an argument has an unsuitable shape, dtype or device, or the backend cannot serve it.
    """
    check("rms_norm", x, weight, eps)
    return operator.forward(x, weight, eps, backend=operator.select(backend, x, weight))[0]
