"""Rotary position embedding."""

import math

import torch
from torch import Tensor

from ttt_kernels import checks
from ttt_kernels.backends import refuse_on_cpu
from ttt_kernels.registry import Operator
from ttt_kernels.rope import cpu, reference, triton


def _fake(x: Tensor, positions: Tensor, theta: float, interleaved: bool) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


operator = Operator(
    name="rope",
    inputs={"x": "Tensor", "positions": "Tensor"},
    params={"theta": "float", "interleaved": "bool"},
    outputs={"y": "Tensor"},
    saved={},
    differentiable=("x",),
    fake=_fake,
    kernels={
        "reference": {
            "forward": reference.forward,
            "backward": reference.backward,
            "double_backward": reference.double_backward,
        },
        "cpu": {
            "forward": cpu.forward,
            "backward": cpu.backward,
            "double_backward": cpu.double_backward,
        },
        "triton": {
            "forward": triton.forward,
            "backward": triton.backward,
            "double_backward": triton.double_backward,
        },
    },
    refusals={"cpu": refuse_on_cpu, "triton": triton.refuse},
)


def check(name: str, x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Checks the arguments of a rotation, for the error messages of `name`.

    Returns:
        positions, int64 on x's device; a GPU does not wait for its own to come to the CPU.
    """
    checks.floating(name, x=x)
    if x.dim() != 4 or x.shape[-1] % 2 or not x.shape[-1]:
        raise ValueError(f"{name}: x has shape {checks.shape(x)}; accepted are (B, T, H, D) with an even D")
    if not isinstance(positions, Tensor):
        raise ValueError(f"{name}: positions must be an integer tensor, got {type(positions).__name__}")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"{name}: positions has dtype {positions.dtype}; accepted are integer dtypes")
    if positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(
            f"{name}: positions has shape {checks.shape(positions)}; accepted are (T,) and (B, T) "
            f"of x (B, T, H, D), x having shape {checks.shape(x)}"
        )
    if not 0 < theta < math.inf:
        raise ValueError(f"{name}: theta is {theta}; accepted are finite values above 0")
    return positions.to(x.device, torch.int64)


def rope(
    x: Tensor,
    positions: Tensor,
    *,
    theta: float = 500_000.0,
    interleaved: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Turns pairs of every head's elements by angles proportional to the position (arXiv 2104.09864).

    Pair i turns by position * theta^(-2i/D). Angles are computed in float64 and their cosines and sines
    rounded to float32, so that positions of many millions are as exact as small ones.

    Args:
        x: (B, T, H, D), D even, any floating dtype; turned in float32 (float64 for float64).
        positions: (T,), or (B, T) with one position per sequence; any integer dtype and device.
        theta: base of the frequencies, above 0.
        interleaved: pairs are neighbours (0, 1), (2, 3), ...; otherwise halves (0, D/2), (1, D/2 + 1), ...
        backend: None for the best that can run, or a backend's name.

    Returns:
        x's shape and dtype. Differentiable twice with respect to x (any number of times on the reference
        backend).

    Raises:
        ValueError: an argument has an unsuitable shape or dtype, or the backend cannot serve the call.
    """
    positions = check("rope", x, positions, theta)
    chosen = operator.select(backend, x, positions)
    return operator.forward(x, positions, float(theta), interleaved, backend=chosen)[0]
