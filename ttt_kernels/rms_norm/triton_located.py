"""Rows that lie apart, as the Triton kernels walk them: without copies wherever strides say where they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Located = tuple[Tensor, int, int, int]
"""A tensor and the strides of its rows' outer, middle and inner dimension."""


@dataclass(frozen=True)
class Rows:
    """Rows of tensors of one shape (..., n), as few dimensions of them as all strides allow, at most three.

    Attributes:
        located: the tensors, None for those that are missing.
        count: rows of each.
        middle, inner: sizes of the two inner dimensions, 1 where there are fewer.
        rank: 1, 2 or 3 dimensions that have strides of their own.
    """

    located: list[Located | None]
    count: int
    middle: int
    inner: int
    rank: int


def rows_of(tensors: Sequence[Tensor | None]) -> Rows:
    """The rows of tensors of one shape, of which some may be missing; copies what three strides do not locate."""
    given = [None if t is None else _unit(t) for t in tensors]
    shape = next(t.shape for t in given if t is not None)
    dimensions = _merged([t for t in given if t is not None])
    if len(dimensions) > 3:
        given = [None if t is None else t.contiguous() for t in given]
        dimensions = _merged([t for t in given if t is not None])
    rank = max(1, len(dimensions))
    # No row is read by the stride of a dimension that there is not.
    dimensions = [(1, (0,) * len(given))] * (3 - len(dimensions)) + dimensions
    strides = [stride for _, stride in dimensions]
    located: list[Located | None] = []
    index = 0
    for t in given:
        if t is None:
            located.append(None)
            continue
        located.append((t, strides[0][index], strides[1][index], strides[2][index]))
        index += 1
    return Rows(located, math.prod(shape[:-1]), dimensions[1][0], dimensions[2][0], rank)


def _unit(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _merged(tensors: Sequence[Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    """Size and strides of the dimensions of rows, neighbours made one where that holds for all tensors."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for i, size in enumerate(tensors[0].shape[:-1]):
        if size == 1:
            continue
        strides = tuple(t.stride(i) for t in tensors)
        if found and found[-1][1] == tuple(size * stride for stride in strides):
            found[-1] = (found[-1][0] * size, strides)
        else:
            found.append((size, strides))
    return found
