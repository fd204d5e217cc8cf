"""SwiGLU with the C++ kernels of csrc/cpu/swiglu.cpp between its products."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ttt_kernels.extension import addresses, dtype_code, kernels
from ttt_kernels.registry import Kernel
from ttt_kernels.swiglu import products

_Optional = Tensor | None


class _Passes:
    """As `products.Passes`."""

    def forward(
        self, x: Tensor, w_gate: Tensor, w_up: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = products.gate_and_up(x, w_gate, w_up)
        hidden = torch.empty_like(gate)
        # Where products have x's type, their results are what is kept.
        kept = (gate, up) if gate.dtype == dtype else (torch.empty_like(gate, dtype=dtype) for _ in range(2))
        kept_gate, kept_up = kept
        written = (None, None) if kept_gate is gate else (kept_gate, kept_up)
        kernels().swiglu_forward(
            dtype_code(dtype), dtype_code(gate.dtype), *addresses(gate, up, hidden, *written), gate.numel()
        )
        return hidden, kept_gate, kept_up

    def backward(
        self,
        gate: Tensor,
        up: Tensor,
        d_hidden: _Optional,
        carried: Sequence[_Optional],
        like: Tensor,
        wanted: Sequence[bool],
    ) -> tuple[_Optional, ...]:
        results = products.results(gate, like, wanted)
        kernels().swiglu_backward(
            dtype_code(gate.dtype), dtype_code(like.dtype), *addresses(gate, up, d_hidden, *carried, *results),
            gate.numel(),
        )  # fmt: skip
        return tuple(results)

    def double_backward(
        self,
        gate: Tensor,
        up: Tensor,
        d_hidden: _Optional,
        h_bar: _Optional,
        t_gate: _Optional,
        t_up: _Optional,
        like: Tensor,
        wanted: Sequence[bool],
    ) -> tuple[_Optional, ...]:
        given = [None if t is None else t.contiguous() for t in (d_hidden, h_bar, t_gate, t_up)]
        results = products.results(gate, like, wanted)
        kernels().swiglu_double_backward(
            dtype_code(gate.dtype), dtype_code(like.dtype), *addresses(gate, up, *given, *results), gate.numel(),
        )  # fmt: skip
        return tuple(results)


passes = _Passes()
forward: Kernel = partial(products.forward, passes)
backward: Kernel = partial(products.backward, passes)
double_backward: Kernel = partial(products.double_backward, passes)
factored_backward: Kernel = partial(products.factored_backward, passes)
