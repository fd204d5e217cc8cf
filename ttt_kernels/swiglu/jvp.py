"""The twin of `swiglu` that takes tangents, with kernels of its own.

In letters of `reference`, with a, b, c and e the tangents of x and of the three weights: G^ = a Wg^T + x b^T,
U^ = a Wu^T + x c^T, H^ = S' U G^ + S U^, y^ = H^ Wd^T + H e^T. Composed of `swiglu`'s three orders (ttt_kernels/jvp.py)
its backward would make seven of twenty-five products twice, where only x has a tangent.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ttt_kernels.jvp import composed, twin_of_kernels
from ttt_kernels.matmul import sum_of_products
from ttt_kernels.registry import Kernel, Operator
from ttt_kernels.swiglu import cpu, reference, triton
from ttt_kernels.swiglu.products import Passes, as_given, as_operands
from ttt_kernels.swiglu.reference import matrices
from ttt_kernels.tangents import transposed

_Optional = Tensor | None


def twin(base: Operator) -> Operator:
    """The operator `swiglu_jvp`, `base` being `swiglu`; see `ttt_kernels.jvp.twin`."""
    plain = composed(base, base.kernels["reference"])

    def reference_forward(*given: Any) -> tuple[Tensor, ...]:
        x, w_gate, w_up, _, a, b, c, _ = given
        return *plain["forward"](*given), *reference.pre_activation_tangents(x, w_gate, w_up, a, b, c)

    def reference_backward(*given: Any) -> tuple[_Optional, ...]:
        *arguments, _, _, needs = given
        return plain["backward"](*arguments, needs)

    kernels: dict[str, dict[str, Kernel]] = {
        "reference": {"forward": reference_forward, "backward": reference_backward},
        "cpu": {"forward": partial(forward, cpu.passes), "backward": partial(backward, cpu.passes)},
        "triton": {"forward": partial(forward, triton.passes), "backward": partial(backward, triton.passes)},
    }
    saved = {**base.saved, "gate_dot": "Tensor", "up_dot": "Tensor"}
    return twin_of_kernels(base, kernels, _fake, saved)


def _fake(x: Tensor, w_gate: Tensor, *rest: _Optional) -> tuple[Tensor, ...]:
    """y, its tangent, and G, U and their tangents."""
    saved = (*x.shape[:-1], w_gate.shape[-2])
    return x.new_empty(x.shape), x.new_empty(x.shape), *(x.new_empty(saved) for _ in range(4))


def forward(
    passes: Passes,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    x_dot: _Optional,
    w_gate_dot: _Optional,
    w_up_dot: _Optional,
    w_down_dot: _Optional,
) -> tuple[Tensor, ...]:
    """y and y^ (x's shape), G, U, G^ and U^ (x.shape[:-1] and the intermediate size), all in x's dtype."""
    (rows,) = as_operands(matrices(w_gate, x), x)
    (a,) = as_operands((None if x_dot is None else matrices(w_gate, x_dot)[0],), x)
    of_gate, of_up, of_down, b, c, e = as_operands(
        (w_gate, w_up, w_down, w_gate_dot, w_up_dot, w_down_dot), x
    )
    assert rows is not None
    assert of_gate is not None
    assert of_up is not None
    hidden, gate, up = passes.forward(rows, of_gate, of_up, x.dtype)
    t_gate = sum_of_products((a, of_gate.mT), (rows, transposed(b)))
    t_up = sum_of_products((a, of_up.mT), (rows, transposed(c)))
    of_hidden = (True, *[False] * 5)
    t_hidden = passes.double_backward(gate, up, None, None, t_gate, t_up, hidden, of_hidden)[0]
    y = sum_of_products((hidden, transposed(of_down)))
    t_y = sum_of_products((t_hidden, transposed(of_down)), (hidden, transposed(e)))
    kept = [torch.zeros_like(gate) if t is None else t for t in (t_gate, t_up)]
    shape = (*x.shape[:-1], w_gate.shape[-2])
    return (
        *(as_given(t, x.dtype, x.shape) for t in (y, t_y)),
        *(as_given(t, x.dtype, shape) for t in (gate, up, *kept)),
    )


def backward(
    passes: Passes,
    dy: Tensor,
    t_dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    x_dot: _Optional,
    w_gate_dot: _Optional,
    w_up_dot: _Optional,
    w_down_dot: _Optional,
    gate: Tensor,
    up: Tensor,
    gate_dot: Tensor,
    up_dot: Tensor,
    needs: Sequence[bool],
) -> tuple[_Optional, ...]:
    """From the cotangents of y and y^, those of all eight tensors that are wanted.

    With D = t_dy Wd of H^ and K = dy Wd + t_dy e of H: the cotangents of G^ and U^ are D U S' and D S, those of G and
    U D (S'' U G^ + S' U^) + K U S' and D S' G^ + K S.
    """
    given = matrices(w_gate, dy, t_dy, x, *(t.contiguous() for t in (gate, up, gate_dot, up_dot)))
    gate_, up_ = given[3:5]
    dy_, t_dy_, rows, t_gate, t_up = as_operands((*given[:3], *given[5:]), x)
    assert dy_ is not None
    (a,) = as_operands((None if x_dot is None else matrices(w_gate, x_dot)[0],), x)
    of_gate, of_up, of_down, b, c, e = as_operands(
        (w_gate, w_up, w_down, w_gate_dot, w_up_dot, w_down_dot), x
    )
    of_inputs, of_tangents = any(needs[:3]), any(needs[4:7])
    has_tangents = needs[0] and (b is not None or c is not None)

    d_hidden = sum_of_products((t_dy_, of_down)) if of_inputs or of_tangents else None
    h_bar = sum_of_products((dy_, of_down), (t_dy_, e)) if of_inputs else None
    of_gate_dot = of_tangents or has_tangents or (a is not None and any(needs[1:3]))
    wanted = (needs[3], of_inputs, of_inputs, of_gate_dot, of_gate_dot, needs[3] or needs[7])
    found = passes.double_backward(gate_, up_, d_hidden, h_bar, t_gate, t_up, dy_, wanted)
    t_hidden, gate_bar, up_bar, d_gate, d_up, hidden = found

    like = (x, w_gate, w_up, w_down)
    pairs = (
        ((gate_bar, of_gate), (up_bar, of_up), (d_gate, b), (d_up, c)),
        ((transposed(gate_bar), rows), (transposed(d_gate), a)),
        ((transposed(up_bar), rows), (transposed(d_up), a)),
        ((transposed(dy_), hidden), (transposed(t_dy_), t_hidden)),
        ((d_gate, of_gate), (d_up, of_up)),
        ((transposed(d_gate), rows),),
        ((transposed(d_up), rows),),
        ((transposed(t_dy_), hidden),),
    )
    return tuple(
        as_given(sum_of_products(*products, dtype=t.dtype), t.dtype, t.shape) if need else None
        for products, t, need in zip(pairs, (*like, *like), needs, strict=True)
    )
