"""RMSNorm of every head and rotation by the position in one pass, where no gradient is recorded."""

import torch
from torch import Tensor

from ttt_kernels import checks
from ttt_kernels.backends import refuse_on_cpu, select
from ttt_kernels.extension import compute_dtype, dtype_code, kernels
from ttt_kernels.rms_norm import reference as rms_norm_reference
from ttt_kernels.rope import check, reference
from ttt_kernels.rope.cpu import unit_stride
from ttt_kernels.rope.tables import tables


def norm_rope_(
    x: Tensor,
    weight: Tensor,
    positions: Tensor,
    *,
    eps: float = 1e-6,
    theta: float = 500_000.0,
    interleaved: bool = True,
    out: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Writes rope(rms_norm(x, weight)) into `out`: the queries or keys of attention with QK-norm.

    The C++ kernel does not round between the two; the reference is the two operators, one after the other.

    Args:
        x: (B, T, H, D), D even.
        weight: (D,), x's dtype, or float32 beside a bfloat16 or float16 x.
        positions: (T,) or (B, T), integers.
        eps: added to the mean square; positive or zero.
        theta: base of the frequencies.
        interleaved: as for `rope`.
        out: (B, T, H, D) of x's dtype, unit stride in D: a slice of a key cache, or x itself.
        backend: None for the best that can run, or a backend's name.

    Returns:
        The norm's reciprocal root mean square (B, T, H), float32 (float64 for float64).

    Raises:
        ValueError: an argument is unsuitable or wants a gradient, or the backend cannot serve the call.
    """
    name = "norm_rope_"
    checks.floating(name, x=x, weight=weight, out=out)
    checks.same_device(name, x=x, weight=weight, out=out)
    checks.weight_dtype(name, x, weight=weight)
    positions = check(name, x, positions, theta)
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: weight has shape {checks.shape(weight)}; accepted is (D,) = ({x.shape[-1]},), "
            f"x having shape {checks.shape(x)}"
        )
    if out.shape != x.shape or out.dtype != x.dtype or out.stride(-1) != 1:
        raise ValueError(
            f"{name}: out has shape {checks.shape(out)}, dtype {out.dtype} and stride {out.stride(-1)} in D; "
            f"accepted are x's shape {checks.shape(x)} and dtype {x.dtype}, and stride 1"
        )
    if eps < 0:
        raise ValueError(f"{name}: eps is {eps}; accepted are values of at least 0")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or out.requires_grad):
        raise ValueError(
            f"{name}: no gradient is recorded; accepted are tensors that want none, or torch.no_grad()"
        )
    chosen = select(name, backend, (x, weight, positions, out), {"cpu": refuse_on_cpu})
    if chosen == "reference":
        y, rstd = rms_norm_reference.forward(x, weight, None, eps)
        out.copy_(reference.forward(y, positions, theta, interleaved)[0])
        return rstd
    return _cpu(x, weight, positions, eps, theta, interleaved, out)


def _cpu(
    x: Tensor, weight: Tensor, positions: Tensor, eps: float, theta: float, interleaved: bool, out: Tensor
) -> Tensor:
    x = unit_stride(x)
    wide = weight.to(compute_dtype(x.dtype)).contiguous()
    rstd = wide.new_empty(x.shape[:-1])
    if x.numel():
        cos, sin = tables(positions, x.shape[-1], float(theta), wide.dtype)
        table_b = 0 if positions.dim() == 1 else cos.numel() // x.shape[0]
        kernels().rope_norm_rotate(
            dtype_code(x.dtype), x.data_ptr(), *x.stride()[:3], wide.data_ptr(), cos.data_ptr(),
            sin.data_ptr(), table_b, out.data_ptr(), *out.stride()[:3], rstd.data_ptr(), *x.shape,
            interleaved, eps,
        )  # fmt: skip
    return rstd
