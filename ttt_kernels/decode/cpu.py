"""One token through the whole stack in one call of csrc/cpu/decode.cpp."""

import torch
from torch import Tensor

from ttt_kernels.decode.layers import Stack
from ttt_kernels.decode.plan import Plan, Plans
from ttt_kernels.extension import dtype_code, kernels

_plans = Plans(Plan)
refusal = _plans.refusal


def step(stack: Stack, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `ttt_kernels.decode.step`."""
    plan = _plans.current(stack)
    x, cos, sin, visible = x.contiguous(), cos.contiguous(), sin.contiguous(), visible.contiguous()
    prefix_output, hidden = torch.empty_like(x), torch.empty_like(x)
    logits = torch.empty(x.shape[0], stack.head.shape[0])
    kernels().decode_step(
        dtype_code(x.dtype), plan.table.buffer_info()[0], visible.data_ptr(), len(stack.layers),
        stack.n_prefix, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), stack.final_norm.data_ptr(),
        stack.head.data_ptr(), prefix_output.data_ptr(), hidden.data_ptr(), logits.data_ptr(), x.shape[0],
        stack.hidden_size, stack.n_heads, stack.intermediate_size, stack.head.shape[0], stack.eps,
    )  # fmt: skip
    return prefix_output, hidden, logits
