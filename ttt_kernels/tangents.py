"""Tangents and cotangents, of which None is zero and costs no product."""

from typing import overload

import torch
from torch import Tensor

from ttt_kernels import checks
from ttt_kernels.matmul import mm


def product(a: Tensor | None, b: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor | None:
    """`mm(a, b, out_dtype)`, or None where a factor is zero."""
    return None if a is None or b is None else mm(a, b, out_dtype)


def transposed(t: Tensor | None) -> Tensor | None:
    """The matrix (or batch of them) transposed."""
    return None if t is None else t.mT


@overload
def total(first: Tensor, *rest: Tensor | None) -> Tensor: ...
@overload
def total(first: Tensor | None, *rest: Tensor | None) -> Tensor | None: ...
def total(first: Tensor | None, *rest: Tensor | None) -> Tensor | None:
    """Sum of the terms that are not zero."""
    present = [t for t in (first, *rest) if t is not None]
    return sum(present[1:], present[0]) if present else None


def check(operator: str, **pairs: tuple[Tensor, Tensor | None]) -> None:
    """Every tangent is like its argument, given as name=(argument, tangent).

    Raises:
        ValueError: a tangent has another shape, dtype or device.
    """
    for name, (argument, tangent) in pairs.items():
        if tangent is None:
            continue
        if not isinstance(tangent, Tensor):
            raise ValueError(f"{operator}: {name}_dot must be a tensor, got {type(tangent).__name__}")
        if _describe(tangent) != _describe(argument):
            raise ValueError(
                f"{operator}: {name}_dot has {_describe(tangent)}; accepted is {name}'s {_describe(argument)}"
            )


def _describe(t: Tensor) -> str:
    return f"shape {checks.shape(t)}, {t.dtype}, on {t.device}"
