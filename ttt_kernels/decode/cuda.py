"""One token through the whole stack in one launch of csrc/cuda/decode.cu."""

import torch
from torch import Tensor

from ttt_kernels import extension
from ttt_kernels.decode.layers import Stack
from ttt_kernels.decode.plan import Plan, Plans, named
from ttt_kernels.triton_launch import on

_VECTOR = 8
"""Elements that a row must be a multiple of."""
_ALIGNED = 16
"""Bytes that addresses and strides must be multiples of."""


class _Plan(Plan):
    """A plan whose table is on the stack's device, with memory for what one step leaves to the next stage."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self.refusal = self.refusal or _sizes_refusal(stack) or _alignment_refusal(stack)
        if self.refusal is not None:
            return
        device, kernels = stack.head.device, extension.cuda_kernels()
        with on(device):
            size = kernels.decode_scratch_bytes(
                dtype_code(stack), len(stack.layers), stack.batch_size, stack.hidden_size, stack.n_heads,
                stack.intermediate_size,
            )  # fmt: skip
        if not size:
            self.refusal = (
                f"{stack.batch_size} sequences of width {stack.hidden_size}, {stack.head_dim} a head, are too much "
                "for the shared memory of a multiprocessor; its kernel takes up to 8 sequences, widths up to "
                "3072 and heads up to 256, and as much of that as the GPU has room for"
            )
            return
        self.scratch = torch.zeros(size, dtype=torch.uint8, device=device)
        # A copy from the processor waits for the stream, and so for the zeros, which steps on others then find.
        self.on_device = torch.tensor(self.table, dtype=torch.int64, device=device)


_plans = Plans(_Plan)
refusal = _plans.refusal


def step(stack: Stack, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `ttt_kernels.decode.step`. Where `visible` is on the device nothing waits or comes from the host, so
    that a graph may capture it, once a step before has made the stack's plan. The results then are the graph's, and
    the stack must live as long as it, its tensors staying where they are.
    """
    plan = _plans.current(stack)
    device = x.device
    x, cos, sin = _aligned(x), cos.contiguous(), sin.contiguous()
    visible = visible.to(device, non_blocking=True).contiguous()
    prefix_output, hidden = torch.empty_like(x), torch.empty_like(x)
    logits = x.new_empty(x.shape[0], stack.head.shape[0], dtype=torch.float32)
    with on(device):
        extension.cuda_kernels().decode_step(
            dtype_code(stack), plan.on_device.data_ptr(), visible.data_ptr(), len(stack.layers), stack.n_prefix,
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), stack.final_norm.data_ptr(), stack.head.data_ptr(),
            prefix_output.data_ptr(), hidden.data_ptr(), logits.data_ptr(), plan.scratch.data_ptr(), x.shape[0],
            stack.hidden_size, stack.n_heads, stack.intermediate_size, stack.head.shape[0], stack.eps,
            extension.stream(device),
        )  # fmt: skip
    return prefix_output, hidden, logits


def dtype_code(stack: Stack) -> int:
    """Of the stack's matrices."""
    return extension.dtype_code(stack.head.dtype)


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNED else x


def _sizes_refusal(stack: Stack) -> str | None:
    sizes = {"hidden size": stack.hidden_size, "width of a head": stack.head_dim,
             "intermediate size": stack.intermediate_size}  # fmt: skip
    for name, size in sizes.items():
        if size % _VECTOR:
            return f"the {name} is {size}; its kernel takes multiples of {_VECTOR}"
    return None


def _alignment_refusal(stack: Stack) -> str | None:
    for name, t in named(stack):
        strides = [n * t.element_size() for n in t.stride()[:2]] if name.endswith("cache") else []
        if t.data_ptr() % _ALIGNED or any(n % _ALIGNED for n in strides):
            return (
                f"{name} begins at address {t.data_ptr()} with strides {t.stride()}; its kernel takes multiples of "
                f"{_ALIGNED} bytes"
            )
    return None
