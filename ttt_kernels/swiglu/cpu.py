"""SwiGLU: products by torch's BLAS, and between them the C++ kernels of csrc/cpu/swiglu.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels.extension import compute_dtype, dtype_code, kernels
from ttt_kernels.matmul import accumulate, mm
from ttt_kernels.swiglu.reference import Gradients, matrices


def forward(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    (rows,) = matrices(w_gate, x)
    gate, up = mm(rows, w_gate.mT).contiguous(), mm(rows, w_up.mT).contiguous()
    hidden = torch.empty_like(gate)
    kernels().swiglu_forward(
        dtype_code(x.dtype), gate.data_ptr(), up.data_ptr(), hidden.data_ptr(), hidden.numel()
    )
    saved = (*x.shape[:-1], gate.shape[-1])
    return mm(hidden, w_down.mT).reshape(x.shape), gate.reshape(saved), up.reshape(saved)


def backward(
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    """As `reference.backward`; of the products only those that a wanted gradient needs are made."""
    dy_, x_, gate_, up_ = matrices(w_gate, dy, x, gate.contiguous(), up.contiguous())
    hidden = torch.empty_like(gate_) if needs[3] else None
    if any(needs[:3]):
        d_hidden = mm(dy_, w_down).contiguous()
        d_gate, d_up = torch.empty_like(gate_), torch.empty_like(up_)
        kernels().swiglu_backward(
            dtype_code(x.dtype), d_hidden.data_ptr(), gate_.data_ptr(), up_.data_ptr(), d_gate.data_ptr(),
            d_up.data_ptr(), hidden.data_ptr() if hidden is not None else 0, d_hidden.numel(),
        )  # fmt: skip
    elif hidden is not None:
        kernels().swiglu_forward(
            dtype_code(x.dtype), gate_.data_ptr(), up_.data_ptr(), hidden.data_ptr(), hidden.numel()
        )
    dx = None
    if needs[0]:
        dx = mm(d_gate, w_gate, compute_dtype(x.dtype))
        accumulate(dx, d_up, w_up)
        dx = dx.to(x.dtype).reshape(x.shape)
    return (
        dx,
        mm(d_gate.mT, x_, w_gate.dtype) if needs[1] else None,
        mm(d_up.mT, x_, w_up.dtype) if needs[2] else None,
        mm(dy_.mT, hidden, w_down.dtype) if hidden is not None else None,
    )
