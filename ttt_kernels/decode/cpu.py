"""One token through the whole stack in one call of csrc/cpu/decode.cpp."""

from array import array
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ttt_kernels.decode.layers import CACHES, FAST, LayerWeights, Stack
from ttt_kernels.extension import dtype_code, kernels

# The order of the rows of the C++ table (csrc/cpu/decode.h), the caches' strides coming after.
_TENSORS = (
    "seq_norm", "w_qkv", "q_norm", "k_norm", "w_o", "seq_post_norm", "mlp_norm", "w_gate", "w_up", "w_down",
    "mlp_post_norm", *FAST, *CACHES,
)  # fmt: skip


class DecodePlan:
    """The addresses of a stack's tensors, laid out once for all its tokens.

    Attributes:
        table: what csrc/cpu/decode.h calls the table of layers.
        refusal: why the kernel cannot take these tensors, or None.
    """

    def __init__(self, stack: Stack) -> None:
        self.table = array("q", [value for layer in stack.layers for value in _row(layer)])
        self.refusal = _refusal(stack)
        self._tensors = [t for layer in stack.layers for t in _tensors(layer) if t is not None]
        self._addresses = self._current()

    def _current(self) -> list[int]:
        return [t.data_ptr() for t in self._tensors]

    @property
    def is_stale(self) -> bool:
        """Whether a tensor has moved since: `module.to(...)` gives a parameter other memory."""
        return self._current() != self._addresses


_plans: WeakKeyDictionary[Stack, DecodePlan] = WeakKeyDictionary()


def _plan(stack: Stack) -> DecodePlan:
    """The stack's plan, made at its first step and whenever a tensor has moved."""
    plan = _plans.get(stack)
    if plan is None or plan.is_stale:
        plan = _plans[stack] = DecodePlan(stack)
    return plan


def refusal(stack: Stack) -> str | None:
    """Why the kernel cannot take a stack's tensors, or None."""
    return (_plans.get(stack) or _plan(stack)).refusal


def step(stack: Stack, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `ttt_kernels.decode.step`."""
    plan = _plan(stack)
    if plan.refusal is not None:
        raise ValueError(f"decode: a tensor of the stack has changed: {plan.refusal}")
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


def _tensors(layer: LayerWeights) -> list[Tensor | None]:
    return [getattr(layer, name) for name in _TENSORS]


def _row(layer: LayerWeights) -> list[int]:
    addresses = [0 if t is None else t.data_ptr() for t in _tensors(layer)]
    return addresses + [stride for name in CACHES for stride in getattr(layer, name).stride()[:2]]


def _refusal(stack: Stack) -> str | None:
    dtype = stack.head.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"head has dtype {dtype}; the kernel computes in float32"
    named = [("final_norm", stack.final_norm), ("head", stack.head)]
    for index, layer in enumerate(stack.layers):
        named += [
            (f"layers[{index}].{name}", t)
            for name, t in zip(_TENSORS, _tensors(layer), strict=True)
            if t is not None
        ]
    for name, t in named:
        wanted = torch.float32 if name.endswith("norm") else dtype
        if t.dtype != wanted:
            return f"{name} has dtype {t.dtype}; its kernel takes {wanted}"
        rows = t[0, 0] if name.endswith("cache") and t.numel() else t
        if not rows.is_contiguous():
            return f"{name} of shape {tuple(t.shape)} has strides {t.stride()}; its kernel takes whole rows"
    return None
