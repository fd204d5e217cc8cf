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
        self,
        gate: Tensor,
        up: Tensor,
        d_hidden: Optional,
        carried: Sequence[Optional],
        like: Tensor,
        wanted: Sequence[bool],
    ) -> tuple[Optional, ...]:
        """dG, dU and H, those that are wanted, in like's type; `carried`, in gate's, is added to the first two."""
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


def like_or_zero(t: Optional, like: Tensor) -> Tensor:
    """The same of a sum that may be empty."""
    return torch.zeros_like(like) if t is None else as_given(t, like.dtype, like.shape)


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
    dy: Optional,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    needs: Sequence[bool],
    to_gate: Optional = None,
    to_up: Optional = None,
) -> Gradients:
    """As `reference.backward`."""
    carried = (to_gate, to_up)
    dx, factors = factored_backward(passes, dy, x, w_gate, w_up, w_down, gate, up, needs, carried)
    return dx, *weight_gradients(factors, w_gate, w_up, w_down, needs[1:])


def factored_backward(
    passes: Passes,
    dy: Optional,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    needs: Sequence[bool],
    carried: Sequence[Optional] = (None, None),
) -> tuple[Optional, Factors]:
    """As `reference.factored_backward`."""
    x_, gate_, up_ = matrices(w_gate, x, gate.contiguous(), up.contiguous())
    x_ = operand(x_)
    dy_ = None if dy is None else operand(matrices(w_gate, dy)[0])
    d_hidden = None
    if dy_ is not None and any(needs[:3]):
        d_hidden = torch.matmul(dy_, operand(w_down.to(x.dtype))).contiguous()
    wanted = (needs[0] or needs[1], needs[0] or needs[2], needs[3] and dy is not None)
    extra = [None if t is None else t.contiguous() for t in carried]
    d_gate, d_up, hidden = passes.backward(gate_, up_, d_hidden, extra, x_, wanted)
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
        like_or_zero(sum_of_products((transposed(left), right), dtype=w.dtype), w) if need else None
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
    carries_gate, carries_up = (*needs[5:], False, False)[:2]

    t_gate = sum_of_products((a, of_gate.mT), (x_, transposed(b)))
    t_up = sum_of_products((a, of_up.mT), (x_, transposed(c)))
    wanted = (
        needs[0] or needs[4],
        carries_gate or needs[1] or needs[2],
        carries_up or needs[1] or needs[3],
        (needs[1] and b is not None) or (needs[2] and a is not None),
        (needs[1] and c is not None) or (needs[3] and a is not None),
        needs[0] and e is not None,
    )
    d_hidden = torch.matmul(dy_, of_down).contiguous() if any(wanted[1:5]) else None
    h_bar = sum_of_products((dy_, e)) if any(wanted[1:3]) else None
    found = passes.double_backward(gate_, up_, d_hidden, h_bar, t_gate, t_up, dy_, wanted)
    t_hidden, gate_bar, up_bar, d_gate, d_up, hidden = found
    through_gate, through_up = None if carries_gate else gate_bar, None if carries_up else up_bar

    d_dy = d_x = d_w_gate = d_w_up = d_w_down = None
    if needs[0]:
        total = sum_of_products((t_hidden, of_down.mT), (hidden, transposed(e)))
        d_dy = as_given(total, dy.dtype, dy.shape)
    if needs[1]:
        total = sum_of_products((through_gate, of_gate), (through_up, of_up), (d_gate, b), (d_up, c))
        d_x = like_or_zero(total, x)
    if needs[2]:
        total = sum_of_products((transposed(through_gate), x_), (transposed(d_gate), a), dtype=w_gate.dtype)
        d_w_gate = like_or_zero(total, w_gate)
    if needs[3]:
        total = sum_of_products((transposed(through_up), x_), (transposed(d_up), a), dtype=w_up.dtype)
        d_w_up = like_or_zero(total, w_up)
    if needs[4]:
        d_w_down = as_given(
            sum_of_products((dy_.mT, t_hidden), dtype=w_down.dtype), w_down.dtype, w_down.shape
        )
    return (
        *(d_dy, d_x, d_w_gate, d_w_up, d_w_down),
        as_given(gate_bar, gate.dtype, gate.shape) if carries_gate else None,
        as_given(up_bar, up.dtype, up.shape) if carries_up else None,
    )
