"""Rotary position embedding on the C++ kernels of csrc/cpu/rope.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels.extension import beyond_caches, compute_dtype, dtype_code, kernels
from ttt_kernels.rope.tables import tables


def unit_stride(t: Tensor) -> Tensor:
    """`t`, copied only if its last dimension is strided."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _rotate(x: Tensor, positions: Tensor, theta: float, interleaved: bool, inverse: bool) -> Tensor:
    x = unit_stride(x)
    y = x.new_empty(x.shape)
    if x.numel():
        cos, sin = tables(positions, x.shape[-1], theta, compute_dtype(x.dtype))
        table_b = 0 if positions.dim() == 1 else cos.numel() // x.shape[0]
        kernels().rope_rotate(
            dtype_code(x.dtype), x.data_ptr(), *x.stride()[:3], cos.data_ptr(), sin.data_ptr(), table_b,
            y.data_ptr(), *y.stride()[:3], *x.shape, interleaved, inverse, beyond_caches(y),
        )  # fmt: skip
    return y


def forward(x: Tensor, positions: Tensor, theta: float, interleaved: bool) -> tuple[Tensor]:
    """As `reference.forward`."""
    return (_rotate(x, positions, theta, interleaved, inverse=False),)


def backward(
    dy: Tensor, x: Tensor, positions: Tensor, theta: float, interleaved: bool, needs: Sequence[bool]
) -> tuple[Tensor | None]:
    """As `reference.backward`."""
    return (_rotate(dy, positions, theta, interleaved, inverse=True) if needs[0] else None,)


def double_backward(
    g_x: Tensor | None,
    dy: Tensor,
    x: Tensor,
    positions: Tensor,
    theta: float,
    interleaved: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """As `reference.double_backward`."""
    if g_x is None:
        g_x = torch.zeros_like(dy)
    return (
        _rotate(g_x, positions, theta, interleaved, inverse=False) if needs[0] else None,
        torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[1] else None,
    )
