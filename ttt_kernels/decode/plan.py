"""Where a stack's tensors are, laid out once for all its tokens."""

from array import array
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ttt_kernels.decode.layers import CACHES, FAST, LayerWeights, Stack

# The order of the rows of the C++ table (csrc/common/decode_layer.h), the caches' strides coming after.
TENSORS = (
    "seq_norm", "w_qkv", "q_norm", "k_norm", "w_o", "seq_post_norm", "mlp_norm", "w_gate", "w_up", "w_down",
    "mlp_post_norm", *FAST, *CACHES,
)  # fmt: skip


def tensors(layer: LayerWeights) -> list[Tensor | None]:
    """Those of `TENSORS`."""
    return [getattr(layer, name) for name in TENSORS]


def named(stack: Stack) -> list[tuple[str, Tensor]]:
    """Every tensor of a stack with its name."""
    found = [("final_norm", stack.final_norm), ("head", stack.head)]
    for index, layer in enumerate(stack.layers):
        both = zip(TENSORS, tensors(layer), strict=True)
        found += [(f"layers[{index}].{name}", t) for name, t in both if t is not None]
    return found


class Plan:
    """The addresses of a stack's tensors.

    Attributes:
        table: what csrc/common/decode_layer.h calls the table of layers.
        refusal: why the kernels cannot take these tensors, or None.
    """

    def __init__(self, stack: Stack) -> None:
        self.table = array("q", [value for layer in stack.layers for value in _row(layer)])
        self.refusal = _refusal(stack)
        self._tensors = [t for _, t in named(stack)]
        self._addresses = self._current()

    def _current(self) -> list[int]:
        return [t.data_ptr() for t in self._tensors]

    @property
    def is_stale(self) -> bool:
        """Whether a tensor has moved since: `module.to(...)` gives a parameter other memory."""
        return self._current() != self._addresses


P = TypeVar("P", bound=Plan)


class Plans(Generic[P]):
    """The plan of every stack that lives, made by `make`."""

    def __init__(self, make: Callable[[Stack], P]) -> None:
        self._make = make
        self._plans: WeakKeyDictionary[Stack, P] = WeakKeyDictionary()

    def current(self, stack: Stack) -> P:
        """The stack's plan, made at its first step and whenever a tensor has moved.

        Raises:
            ValueError: the kernels cannot take its tensors any more.
        """
        plan = self._plans.get(stack)
        if plan is None or plan.is_stale:
            plan = self._plans[stack] = self._make(stack)
        if plan.refusal is not None:
            raise ValueError(f"decode: a tensor of the stack has changed: {plan.refusal}")
        return plan

    def refusal(self, stack: Stack) -> str | None:
        """Why the kernels cannot take a stack's tensors, or None."""
        if (plan := self._plans.get(stack)) is None:
            plan = self._plans[stack] = self._make(stack)
        return plan.refusal


def _row(layer: LayerWeights) -> list[int]:
    addresses = [0 if t is None else t.data_ptr() for t in tensors(layer)]
    return addresses + [stride for name in CACHES for stride in getattr(layer, name).stride()[:2]]


def _refusal(stack: Stack) -> str | None:
    dtype = stack.head.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"head has dtype {dtype}; the kernel computes in float32"
    for name, t in named(stack):
        wanted = torch.float32 if name.endswith("norm") else dtype
        if t.dtype != wanted:
            return f"{name} has dtype {t.dtype}; its kernel takes {wanted}"
        rows = t[0, 0] if name.endswith("cache") and t.numel() else t
        if not rows.is_contiguous():
            return f"{name} of shape {tuple(t.shape)} has strides {t.stride()}; its kernel takes whole rows"
    return None
