"""SwiGLU, its gradient and its gradient's gradient, as formulas.

Forward: G = x Wg^T, U = x Wu^T, H = S U with S = silu(G), y = H Wd^T. A prime is a derivative in G.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_kernels.matmul import mm
from ttt_kernels.tangents import product, total, transposed

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Factors(NamedTuple):
    """What the weights' gradients are products of, over the tokens: dG^T x, dU^T x and dy^T H.

    Matrices (N, .), or batches of them (B, T, .) with weights for each sequence; None where nobody wants it.
    """

    dy: Tensor | None
    x: Tensor
    d_gate: Tensor | None
    d_up: Tensor | None
    hidden: Tensor | None


def wide(t: Tensor) -> Tensor:
    """t as the functions between products are computed: float32, float64 staying what it is."""
    return t if t.dtype == torch.float64 else t.float()


def matrices(weight: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Activations as the products take them: batches for batched weights, else one matrix each."""
    if weight.dim() == 3:
        return tensors
    return tuple(t.reshape(math.prod(t.shape[:-1]), t.shape[-1]) for t in tensors)


def silu_derivatives(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S, S' = s (1 + G (1 - s)) and S'' = s (1 - s) (2 + G (1 - 2 s)), with s the sigmoid of G."""
    s = torch.sigmoid(gate)
    return gate * s, s * (1 + gate * (1 - s)), s * (1 - s) * (2 + gate * (1 - 2 * s))


def forward(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (x's shape), G and U (x.shape[:-1] and the intermediate size), all in x's dtype."""
    gate, up = mm(x, w_gate.mT), mm(x, w_up.mT)
    hidden = (torch.nn.functional.silu(wide(gate)) * wide(up)).to(x.dtype)
    return mm(hidden, w_down.mT), gate, up


def backward(
    dy: Tensor | None,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    needs: Sequence[bool],
    to_gate: Tensor | None = None,
    to_up: Tensor | None = None,
) -> Gradients:
    """dH = dy Wd, dG = dH U S', dU = dH S; dx = dG Wg + dU Wu, dWg = dG^T x, dWu = dU^T x, dWd = dy^T H.

    Cotangents that G and U have themselves are added to dG and dU.
    """
    dy = x.new_zeros(x.shape) if dy is None else dy
    carried = (to_gate, to_up)
    dx, factors = factored_backward(dy, x, w_gate, w_up, w_down, gate, up, needs, carried)
    return dx, *weight_gradients(factors, w_gate, w_up, w_down, needs[1:])


def factored_backward(
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    needs: Sequence[bool],
    carried: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor | None, Factors]:
    """dx, and the weights' gradients as factors for `weight_gradients`; kernels leave out what is not wanted.

    `carried` are cotangents of G and U.
    """
    dy_, x_, gate_, up_ = matrices(w_gate, dy, x, gate, up)
    silu, slope, _ = silu_derivatives(wide(gate_))
    d_hidden = mm(dy_, w_down, torch.promote_types(x.dtype, torch.float32))
    d_gate, d_up = (
        total(d, None if extra is None else wide(extra.reshape(d.shape))).to(x.dtype)
        for d, extra in zip((d_hidden * wide(up_) * slope, d_hidden * silu), carried, strict=True)
    )
    hidden = (silu * wide(up_)).to(x.dtype)
    dx = (mm(d_gate, w_gate) + mm(d_up, w_up)).reshape(x.shape) if needs[0] else None
    return dx, Factors(dy_, x_, d_gate, d_up, hidden)


def weight_gradients(
    factors: Factors, w_gate: Tensor, w_up: Tensor, w_down: Tensor, needs: Sequence[bool] = (True, True, True)
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dWg = dG^T x, dWu = dU^T x and dWd = dy^T H, those that are wanted."""
    dy, x, d_gate, d_up, hidden = factors
    return (
        product(transposed(d_gate), x, w_gate.dtype) if needs[0] else None,
        product(transposed(d_up), x, w_up.dtype) if needs[1] else None,
        product(transposed(dy), hidden, w_down.dtype) if needs[2] else None,
    )


def pre_activation_tangents(
    x: Tensor, w_gate: Tensor, w_up: Tensor, a: Tensor | None, b: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """G^ = a Wg^T + x b^T and U^ = a Wu^T + x c^T in x's dtype, a, b and c being tangents of x, Wg and Wu."""
    zero = x.new_zeros(*x.shape[:-1], w_gate.shape[-2])
    return (
        total(zero, product(a, w_gate.mT), product(x, transposed(b))),
        total(zero, product(a, w_up.mT), product(x, transposed(c))),
    )


def double_backward(
    g_x: Tensor | None,
    g_w_gate: Tensor | None,
    g_w_up: Tensor | None,
    g_w_down: Tensor | None,
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Cotangents of dy, x, Wg, Wu and Wd, given those of dx, dWg, dWu and dWd (a, b, c, e).

    `needs` may go on with whether those of G and U are wanted, which the other ones then leave out.

    <dx, a> + <dWg, b> + <dWu, c> + <dWd, e> is <dy, y^> with y^ the tangent of y along (a, b, c, e):
    G^ = a Wg^T + x b^T, U^ = a Wu^T + x c^T, H^ = S' U G^ + S U^, y^ = H^ Wd^T + H e^T. So y^ is the
    cotangent of dy, and the others are the gradient of <dH, H^> + <dy e, H> through G and U, where they
    stand in both, plus dG and dU through G^ and U^.
    """
    dy_, x_, gate_, up_ = matrices(w_gate, dy, x, gate, up)
    a = None if g_x is None else matrices(w_gate, g_x)[0]
    compute = torch.promote_types(x.dtype, torch.float32)
    silu, slope, curve = silu_derivatives(wide(gate_))
    u = wide(up_)
    zero = torch.zeros_like(u)
    t_gate, t_up = (
        total(zero, product(a, w.mT, compute), product(x_, transposed(w_dot), compute))
        for w, w_dot in ((w_gate, g_w_gate), (w_up, g_w_up))
    )
    t_hidden = (slope * u * t_gate + silu * t_up).to(x.dtype)

    d_hidden = mm(dy_, w_down, compute)
    h_bar = total(zero, product(dy_, g_w_down, compute))
    gate_bar = (d_hidden * (curve * u * t_gate + slope * t_up) + h_bar * slope * u).to(x.dtype)
    up_bar = (d_hidden * slope * t_gate + h_bar * silu).to(x.dtype)
    d_gate, d_up = (d_hidden * u * slope).to(x.dtype), (d_hidden * silu).to(x.dtype)

    carries_gate, carries_up = (*needs[5:], False, False)[:2]
    through_gate, through_up = None if carries_gate else gate_bar, None if carries_up else up_bar
    d_dy = d_x = d_w_gate = d_w_up = None
    if needs[0]:
        d_dy = total(mm(t_hidden, w_down.mT), product((silu * u).to(x.dtype), transposed(g_w_down)))
    if needs[1]:
        terms = ((through_gate, w_gate), (through_up, w_up), (d_gate, g_w_gate), (d_up, g_w_up))
        d_x = total(torch.zeros_like(x_), *(product(*factors) for factors in terms))
    if needs[2]:
        of_gate = ((transposed(through_gate), x_), (transposed(d_gate), a))
        d_w_gate = total(torch.zeros_like(w_gate), *(product(*f, w_gate.dtype) for f in of_gate))
    if needs[3]:
        of_up = ((transposed(through_up), x_), (transposed(d_up), a))
        d_w_up = total(torch.zeros_like(w_up), *(product(*f, w_up.dtype) for f in of_up))
    return (
        d_dy.reshape(dy.shape) if d_dy is not None else None,
        d_x.reshape(x.shape) if d_x is not None else None,
        d_w_gate,
        d_w_up,
        mm(dy_.mT, t_hidden, w_down.dtype) if needs[4] else None,
        gate_bar.reshape(gate.shape) if carries_gate else None,
        up_bar.reshape(up.shape) if carries_up else None,
    )
