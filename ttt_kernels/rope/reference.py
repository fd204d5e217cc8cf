"""Rotary position embedding, its gradient and its gradient's gradient, as formulas.

Pair i of D/2 at position p turns by the angle p theta^(-2i/D): (a, b) -> (a cos - b sin, b cos + a sin).
The rotation is linear in x and orthogonal, so its gradient is the rotation by the negative angle.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta^(-2i/D) for i < D/2, float64 on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    return theta**-exponents


def tables(positions: Tensor, x: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (1 or B, T, 1, D/2) in the type that x is turned in, on x's device.

    The angles are float64 on the CPU (other devices may have none): in float32 an angle at position 10
    million would be wrong by half a radian.
    """
    angles = positions.cpu().double()[..., None, None] * inverse_frequencies(x.shape[-1], theta)
    if positions.dim() == 1:
        angles = angles[None]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return angles.cos().to(dtype).to(x.device), angles.sin().to(dtype).to(x.device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = x.to(cos.dtype)
    if interleaved:
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = wide.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.to(x.dtype)


def forward(x: Tensor, positions: Tensor, theta: float, interleaved: bool) -> tuple[Tensor]:
    """Returns x (B, T, H, D) turned by the angles of positions (T,) or (B, T)."""
    return (_rotate(x, *tables(positions, x, theta), interleaved),)


def backward(
    dy: Tensor, x: Tensor, positions: Tensor, theta: float, interleaved: bool, needs: Sequence[bool]
) -> tuple[Tensor | None]:
    """dx: dy turned by the negative angles."""
    if not needs[0]:
        return (None,)
    cos, sin = tables(positions, x, theta)
    return (_rotate(dy, cos, -sin, interleaved),)


def double_backward(
    g_x: Tensor | None,
    dy: Tensor,
    x: Tensor,
    positions: Tensor,
    theta: float,
    interleaved: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Cotangents of dy (that of dx turned forward) and of x (zero: dx does not depend on x)."""
    if g_x is None:
        g_x = torch.zeros_like(dy)
    return (
        forward(g_x, positions, theta, interleaved)[0] if needs[0] else None,
        torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[1] else None,
    )
