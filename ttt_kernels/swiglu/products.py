"""SwiGLU on kernels: its matrix products, each made only where a wanted result needs it.

Products are torch's BLAS; what stands between them is a backend's passes. Letters are those of `reference`. What is
computed between two products stays in the products' type: it is rounded to x's only where it is kept or returned.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ttt_kernels.matmul import operand, sum_of_products
from ttt_kernels.swiglu.reference import Factors, Gradients, matrices
from ttt_kernels.tangents import transposed

Optional = Tensor | None


class Passes(Protocol):
    """The elementwise passes of a backend over contiguous tensors of one shape; None is zero or unwanted."""

    def forward(
        self, x: Tensor, w_gate: Tensor, w_up: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """H in the type of x and the weights, which are operands, and G and U in `dtype`, all contiguous.

        The products are part of it, because a kernel may make them both at once; else they are `gate_and_up`.
        """
        ...

    def backward(
        self, gate: Tensor, up: Tensor, d_hidden: Optional, like: Tensor, wanted: Sequence[bool]
    ) -> tuple[Optional, ...]:
        """dG, dU and H, those that are wanted, in like's type."""
        ...

    def double_backward(
        self,
        gate: Tensor,
        up: Tensor,
        d_hidden: Optional,
        h_bar: Optional,
        t_gate: Optional,
        t_up: Optional,
        like: Tensor,
        wanted: Sequence[bool],
    ) -> tuple[Optional, ...]:
        """H^, the cotangents of G and U, dG, dU and H, those that are wanted, in like's type."""
        ...


def results(gate: Tensor, like: Tensor, wanted: Sequence[bool]) -> list[Optional]:
    """Memory for a pass's results of gate's shape in like's type, those that are wanted."""
    return [like.new_empty(gate.shape) if want else None for want in wanted]


def gate_and_up(x: Tensor, w_gate: Tensor, w_up: Tensor) -> tuple[Tensor, Tensor]:
    """G and U of operands in their type, contiguous."""
    return torch.matmul(x, w_gate.mT).contiguous(), torch.matmul(x, w_up.mT).contiguous()


def as_operands(tensors: Sequence[Optional], x: Tensor) -> list[Optional]:
    """Tensors, or weights, as the products with x read them."""
    return [None if t is None else operand(t.to(x.dtype)) for t in tensors]


def as_given(t: Optional, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A product in the type and the shape of what it belongs to."""
    assert t is not None
    return t.to(dtype).reshape(shape)


def forward(
    passes: Passes, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    rows = operand(matrices(w_gate, x)[0])
    of_gate, of_up, of_down = (operand(w.to(x.dtype)) for w in (w_gate, w_up, w_down))
    hidden, gate, up = passes.forward(rows, of_gate, of_up, x.dtype)
    saved = (*x.shape[:-1], w_gate.shape[-2])
    y = torch.matmul(hidden, of_down.mT).to(x.dtype).reshape(x.shape)
    return y, gate.reshape(saved), up.reshape(saved)


def backward(
    passes: Passes,
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    """As `reference.backward`."""
    dx, factors = factored_backward(passes, dy, x, w_gate, w_up, w_down, gate, up, needs)
    return dx, *weight_gradients(factors, w_gate, w_up, w_down, needs[1:])


def factored_backward(
    passes: Passes,
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    needs: Sequence[bool],
) -> tuple[Optional, Factors]:
    """As `reference.factored_backward`."""
    dy_, x_, gate_, up_ = matrices(w_gate, dy, x, gate.contiguous(), up.contiguous())
    dy_, x_ = operand(dy_), operand(x_)
    d_hidden = None
    if any(needs[:3]):
        d_hidden = torch.matmul(dy_, operand(w_down.to(x.dtype))).contiguous()
    wanted = (needs[0] or needs[1], needs[0] or needs[2], needs[3])
    d_gate, d_up, hidden = passes.backward(gate_, up_, d_hidden, dy_, wanted)
    dx = None
    if needs[0]:
        total = sum_of_products(*zip((d_gate, d_up), as_operands((w_gate, w_up), x), strict=True))
        dx = as_given(total, x.dtype, x.shape)
    return dx, Factors(dy_, x_, d_gate, d_up, hidden)


def weight_gradients(
    factors: Factors, w_gate: Tensor, w_up: Tensor, w_down: Tensor, needs: Sequence[bool] = (True, True, True)
) -> tuple[Optional, Optional, Optional]:
    """dWg = dG^T x, dWu = dU^T x, dWd = dy^T H, those that are wanted, in the weights' dtypes and shapes."""
    dy, x, d_gate, d_up, hidden = factors
    pairs = ((d_gate, x), (d_up, x), (dy, hidden))
    return tuple(  # type: ignore[return-value]
        as_given(sum_of_products((transposed(left), right), dtype=w.dtype), w.dtype, w.shape)
        if need
        else None
        for (left, right), w, need in zip(pairs, (w_gate, w_up, w_down), needs, strict=True)
    )


def double_backward(
    passes: Passes,
    g_x: Optional,
    g_w_gate: Optional,
    g_w_up: Optional,
    g_w_down: Optional,
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    needs: Sequence[bool],
) -> tuple[Optional, ...]:
    """As `reference.double_backward`."""
    dy_, x_, gate_, up_ = matrices(w_gate, dy, x, gate.contiguous(), up.contiguous())
    dy_, x_ = operand(dy_), operand(x_)
    a = None if g_x is None else operand(matrices(w_gate, g_x)[0])
    b, c, e = as_operands((g_w_gate, g_w_up, g_w_down), x)
    of_gate, of_up, of_down = (operand(w.to(x.dtype)) for w in (w_gate, w_up, w_down))
    of_inputs = needs[1] or needs[2] or needs[3]

    t_gate = sum_of_products((a, of_gate.mT), (x_, transposed(b)))
    t_up = sum_of_products((a, of_up.mT), (x_, transposed(c)))
    d_hidden = torch.matmul(dy_, of_down).contiguous() if of_inputs else None
    h_bar = sum_of_products((dy_, e)) if of_inputs else None
    wanted = (
        needs[0] or needs[4],
        needs[1] or needs[2],
        needs[1] or needs[3],
        (needs[1] and b is not None) or (needs[2] and a is not None),
        (needs[1] and c is not None) or (needs[3] and a is not None),
        needs[0] and e is not None,
    )
    found = passes.double_backward(gate_, up_, d_hidden, h_bar, t_gate, t_up, dy_, wanted)
    t_hidden, gate_bar, up_bar, d_gate, d_up, hidden = found

    d_dy = d_x = d_w_gate = d_w_up = d_w_down = None
    if needs[0]:
        total = sum_of_products((t_hidden, of_down.mT), (hidden, transposed(e)))
        d_dy = as_given(total, dy.dtype, dy.shape)
    if needs[1]:
        total = sum_of_products((gate_bar, of_gate), (up_bar, of_up), (d_gate, b), (d_up, c))
        d_x = as_given(total, x.dtype, x.shape)
    if needs[2]:
        total = sum_of_products((transposed(gate_bar), x_), (transposed(d_gate), a), dtype=w_gate.dtype)
        d_w_gate = as_given(total, w_gate.dtype, w_gate.shape)
    if needs[3]:
        total = sum_of_products((transposed(up_bar), x_), (transposed(d_up), a), dtype=w_up.dtype)
        d_w_up = as_given(total, w_up.dtype, w_up.shape)
    if needs[4]:
        d_w_down = as_given(
            sum_of_products((dy_.mT, t_hidden), dtype=w_down.dtype), w_down.dtype, w_down.shape
        )
    return d_dy, d_x, d_w_gate, d_w_up, d_w_down
