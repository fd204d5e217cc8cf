"""A sequence's elements in a row, as kernels walk them."""

from torch import Tensor


def rows_of(t: Tensor) -> Tensor:
    """(B, n) with unit stride in n; copies only where a sequence's elements are not contiguous."""
    rows = t.reshape(t.shape[0], t.shape[1:].numel())
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()
