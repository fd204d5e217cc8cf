"""What a target may be."""

import torch
from torch import Tensor


def outside(target: Tensor, classes: int) -> Tensor:
    """Which targets are no class."""
    return (target < 0) | (target >= classes)


def check(target: Tensor, classes: int, ignore_index: int) -> None:
    """Every target is a class or `ignore_index`.

    Raises:
        ValueError: one is neither; the message names it.
    """
    bad = outside(target, classes) & (target != ignore_index)
    if bad.any():
        raise ValueError(
            f"linear_cross_entropy: target holds {int(target[bad][0])}; accepted are the classes 0 to "
            f"{classes - 1} of weight and ignore_index {ignore_index}"
        )


def losses(values: Tensor, target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """`values` (N,), 0 where the target is ignored and NaN where it is no class.

    NaN, because nobody has checked the targets of a call that is traced or transformed.
    """
    values = values.masked_fill(outside(target, classes), torch.nan)
    return torch.where(target == ignore_index, torch.zeros_like(values), values)
