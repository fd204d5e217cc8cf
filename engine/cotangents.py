"""Sums over a sequence of what a sweep back through its parts finds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def leaf(t: Tensor) -> Tensor:
    """The same numbers, where a graph starts."""
    return t.detach().requires_grad_()


def pulled(results: Iterable[tuple[Tensor, Tensor | None]], leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """Cotangents of the leaves of a graph, from its results with theirs, None being zero on both sides."""
    given = [(result, g.to(result.dtype)) for result, g in results if g is not None]
    return torch.autograd.grad(
        [result for result, _ in given], leaves, [g for _, g in given], allow_unused=True
    )


class RowCotangents:
    """Cotangents of keys and values, summed over the later parts of a sequence that have seen them.

    `size`: tokens of a part: a mini-batch, a slab or a stretch. Tokens before the first part count from -1 down.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._of: dict[int, list[Tensor]] = {}

    def add(self, start: int, grads: Sequence[Tensor]) -> None:
        """Adds those of the tokens from `start` on, (B, n, H, D) each."""
        length = grads[0].shape[1] if grads else 0
        for index in range(start // self._size, -(-(start + length) // self._size)):
            first = max(start, index * self._size)
            last = min(start + length, (index + 1) * self._size)
            own = slice(first - index * self._size, last - index * self._size)
            pieces = [g[:, first - start : last - start] for g in grads]
            if index not in self._of:
                wide = torch.promote_types(grads[0].dtype, torch.float32)
                self._of[index] = [
                    g.new_zeros(g.shape[0], self._size, *g.shape[2:], dtype=wide) for g in grads
                ]
            for sum_, piece in zip(self._of[index], pieces, strict=True):
                sum_[:, own] += piece

    def add_last(self, length: int, grads: Sequence[Tensor | None]) -> None:
        """Adds those of the last of `length` tokens, (B, n, H, D) each; either all are there or none."""
        given = [g for g in grads if g is not None]
        if given:
            self.add(length - given[0].shape[1], given)

    def pop(self, index: int, like: Sequence[Tensor], skipped: int = 0) -> list[Tensor | None]:
        """Those of a part's tensors, (B, n, H, D) each as `like`, which is without the part's first `skipped` tokens.

        None where nobody has seen them.
        """
        found = self._of.pop(index, None)
        if found is None:
            return [None] * len(like)
        return [g[:, skipped : skipped + t.shape[1]] for g, t in zip(found, like, strict=True)]

    def before(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Those of the tokens before the first part, (B, n, H, D) each as `like`."""
        length = like[0].shape[1]
        parts = [self._of.pop(index, None) for index in range(-length // self._size, 0)]
        found = []
        for i, t in enumerate(like):
            zeros = t.new_zeros(t.shape[0], self._size, *t.shape[2:])
            whole = torch.cat([t[:, :0], *(zeros if part is None else part[i] for part in parts)], 1)
            found.append(whole[:, whole.shape[1] - length :])
        return found


class Totals:
    """Cotangents of slow weights, summed over the parts of a sequence in fp32 at least, in the dtypes stored."""

    def __init__(self, leaves: list[Tensor], dtypes: Sequence[torch.dtype]) -> None:
        self.leaves = leaves
        self._sums: list[Tensor | None] = [None] * len(leaves)
        self._dtypes = dtypes

    @property
    def found(self) -> list[Tensor | None]:
        """One for every leaf, None being zero."""
        return [None if t is None else t.to(d) for t, d in zip(self._sums, self._dtypes, strict=True)]

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Adds one for every leaf, None being zero; the first of each is kept and added to in place."""
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            found, wide = self._sums[i], torch.promote_types(self._dtypes[i], torch.float32)
            self._sums[i] = grad.to(wide) if found is None else found.add_(grad)
