"""Tiles of rows in RMSNorm's Triton kernels.

Names in kernels: `t_` a tensor with the strides of its rows, `p_` an address, `b_` the values of a block, `m_` a
mask; a tile has ROWS rows of N elements, padded to BLOCK, a power of two.
"""

import triton
import triton.language as tl

from ttt_kernels.triton_values import narrow


@triton.jit
def inside(b_row, rows, N: tl.constexpr, BLOCK: tl.constexpr):
    """The mask of a tile's elements."""
    m_inside = (b_row < rows)[:, None]
    if N != BLOCK:
        m_inside = m_inside & (tl.arange(0, BLOCK) < N)[None, :]
    return m_inside


@triton.jit
def _addresses(t, b_row, middle, inner, RANK: tl.constexpr):
    """Of the first elements of rows."""
    if RANK == 1:
        return t[0] + b_row.to(tl.int64) * t[3]
    p_inner = t[0] + (b_row % inner).to(tl.int64) * t[3]
    b_outer = b_row // inner
    if RANK == 2:
        return p_inner + b_outer.to(tl.int64) * t[2]
    return p_inner + (b_outer % middle).to(tl.int64) * t[2] + (b_outer // middle).to(tl.int64) * t[1]


@triton.jit
def load(t, b_row, rows, middle, inner, N: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr):
    """Rows of a tensor, zeros outside."""
    p_tile = _addresses(t, b_row, middle, inner, RANK)[:, None] + tl.arange(0, BLOCK)[None, :]
    return tl.load(p_tile, mask=inside(b_row, rows, N, BLOCK), other=0.0)


@triton.jit
def load_vector(p_x, N: tl.constexpr, BLOCK: tl.constexpr):
    """One row (1, BLOCK) that all rows share, float32."""
    b_column = tl.arange(0, BLOCK)
    return tl.load(p_x + b_column, mask=b_column < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store(p_x, b_x, b_row, rows, N: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a contiguous tensor, in its dtype."""
    p_tile = p_x + b_row.to(tl.int64)[:, None] * N + tl.arange(0, BLOCK)[None, :]
    tl.store(p_tile, narrow(b_x, p_x.dtype.element_ty), mask=inside(b_row, rows, N, BLOCK))


@triton.jit
def mean(b_x, N: tl.constexpr):
    """Of each row, (ROWS, 1)."""
    return tl.sum(b_x, 1)[:, None] * (1.0 / N)
