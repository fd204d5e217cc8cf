"""Rotary position embedding on the Triton kernel of triton_kernels.py, which a first call imports."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels import triton_launch
from ttt_kernels.backends import refuse_on_triton
from ttt_kernels.rope.triton_configs import LARGEST, configs


def refuse(tensors: tuple[Tensor, ...]) -> str | None:
    """What the kernel cannot take besides what no Triton kernel can: large heads."""
    head_dim = tensors[0].shape[-1]
    if head_dim > LARGEST:
        return f"head_dim is {head_dim}; accepted are up to {LARGEST}"
    return refuse_on_triton(tensors)


def _rotate(x: Tensor, positions: Tensor, theta: float, interleaved: bool, inverse: bool) -> Tensor:
    from ttt_kernels.rope import triton_kernels as kernels

    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    if x.stride(3) != 1:
        x = x.contiguous()
    b, t, heads, d = x.shape
    # Callers that pass by the checks may have positions elsewhere.
    positions = positions.to(x.device, torch.int64)
    of_sequence = positions.stride(0) if positions.dim() == 2 else 0

    def programs(sizes: dict[str, int]) -> int:
        return b * -(-t // sizes["POSITIONS"]) * -(-heads // sizes["HEADS"])

    triton_launch.launch(
        "rope.rotate", kernels.rotate, programs, configs(d, heads), (x.dtype, d, heads, interleaved), x.device,
        {
            "t_x": (x, *x.stride()[:3]), "t_positions": (positions, of_sequence, positions.stride(-1)),
            "p_y": y, "T": t, "H": heads, "D": d, "STEP": -2 / d * math.log2(theta),
             "INTERLEAVED": interleaved, "INVERSE": inverse,
        },
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
    to_dy = dy.new_zeros(dy.shape) if needs[0] and g_x is None else None
    if needs[0] and g_x is not None:
        to_dy = _rotate(g_x, positions, theta, interleaved, inverse=False)
    return to_dy, x.new_zeros(x.shape) if needs[1] else None
