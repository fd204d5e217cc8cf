"""An operator's orders on a backend beside the formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_cases import Case
from bench.operator_example import Example, flat

SLACK = 3.0
"""How many times the plain formulas' error at the same dtype is allowed, beside the epsilons of `budget`."""


def work(example: Example, order: str, backend: str, like: list[Any]) -> Callable[[], list[Tensor]]:
    """An order by the backend's kernels, with what its forward saves; cotangents are those among `like`."""
    given = with_cotangents(example.arguments(order, backend), example, order, like)
    if order != "forward":
        given.append(example.wanted(order))
    kernel = example.operator.kernels[backend][order]
    count = len(example.operator.outputs) if order == "forward" else None
    return lambda: flat(list(kernel(*given))[:count])


def with_cotangents(arguments: list[Any], example: Example, order: str, like: list[Any]) -> list[Any]:
    """The arguments with the cotangents among `like`, on the device and in the dtype of their own."""
    operator = example.operator
    count = {"forward": 0, "backward": len(operator.outputs)}.get(
        order, len(operator.outputs) + len(operator.differentiable)
    )

    def moved(value: Any, target: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, list | tuple):
            return [moved(v, t) for v, t in zip(value, target, strict=True)]
        return value.to(target.device, target.dtype)

    return [moved(v, t) for v, t in zip(like[:count], arguments[:count], strict=True)] + arguments[count:]


class Truth:
    """What the formulas make of an order on a device, in float64 and at the case's own dtypes."""

    def __init__(self, case: Case, order: str, device: torch.device, like: list[Any]) -> None:
        """`like`: the arguments of the order at the case's own dtypes, whose cotangents all use."""
        there, given = case.example.each(lambda t: t.to(device)), like
        if case.heads is not None:
            there, given = _of_heads(there, case.heads), _heads_of(like, case.heads)
        self._heads, self._device, self._of = case.heads, device, there.leaves()[0].dtype
        self._exact = work(there.cast(torch.float64), order, "reference", given)()
        self._plain = work(there, order, "reference", given)()

    def error(self, found: list[Tensor]) -> tuple[float, float]:
        """How far a backend's results are from it, and how far they may be: of the worst of them."""
        if self._heads is not None:
            found = [_first_heads(t, self._heads) for t in found]
        errors = [
            (relative_error(f.to(self._device), e), budget(p, e, self._of))
            for f, p, e in zip(found, self._plain, self._exact, strict=True)
        ]
        return max(errors, key=lambda pair: pair[0] / pair[1])


def budget(plain: Tensor, exact: Tensor, of: torch.dtype) -> float:
    """A small multiple of the error of the formulas at the same dtype, `of` being that of the inputs.

    Beside it half an epsilon of 16 bits, which the rounding of a result alone may be, or 4 of a wider dtype, in which
    formulas may happen to be nearly exact.
    """
    widest = max(torch.finfo(plain.dtype).eps, torch.finfo(of).eps)
    narrow = torch.bfloat16 in (plain.dtype, of) or torch.float16 in (plain.dtype, of)
    return SLACK * relative_error(plain, exact) + (0.5 if narrow else 4.0) * widest


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; another shape, NaN and infinity count as infinite."""
    if value.shape != truth.shape:
        return float("inf")
    norm = float(truth.norm())
    error = float((value.double() - truth).norm()) / (norm or 1.0)
    return error if error < float("inf") else float("inf")


def _of_heads(example: Example, heads: int) -> Example:
    return Example(example.operator, tuple(_heads_of(list(example.inputs), heads)), example.params)


def _heads_of(values: list[Any], heads: int) -> list[Any]:
    return [_first_heads(v, heads) if isinstance(v, Tensor) else v for v in values]


def _first_heads(value: Tensor, heads: int) -> Tensor:
    # All of attention's tensors are (B, T, H, D) but its statistics, which every backend makes for itself.
    return value[:, :, :heads].contiguous() if value.dim() == 4 else value
