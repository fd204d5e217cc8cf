"""The rotation in Triton: a program turns some heads of some positions, whose angles it computes once.

Names in kernels: `t_` a tensor with strides, `p_` an address, `b_` the values of a block, `m_` a mask; a tile has
POSITIONS rows of `PAIRS` pairs, the D/2 of a head padded to a power of two.
"""

import triton
import triton.language as tl

from ttt_kernels.rope.triton_angles import angles, rows_of_head, turned
from ttt_kernels.triton_values import narrow


@triton.jit
def _columns(m_row, columns: tl.constexpr, SIZE: tl.constexpr):
    """`columns` columns, and the mask of those of `m_row`'s rows; SIZE is their number padded."""
    b_column = tl.arange(0, SIZE)[None, :]
    if columns != SIZE:
        m_row = m_row & (b_column < columns)
    return b_column, m_row


@triton.jit
def _load(p_x, m_row, D: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr):
    """Heads whose first elements are at p_x: whole, or their two halves."""
    if INTERLEAVED:
        b_column, m_inside = _columns(m_row, D, 2 * PAIRS)
        return (tl.load(p_x + b_column, mask=m_inside, other=0.0),)
    else:
        b_column, m_inside = _columns(m_row, D // 2, PAIRS)
        b_low = tl.load(p_x + b_column, mask=m_inside, other=0.0)
        return b_low, tl.load(p_x + D // 2 + b_column, mask=m_inside, other=0.0)


@triton.jit
def _store(
    p_y, b_x, b_cos, b_sin, m_row,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, POSITIONS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """What `_load` gave, turned."""
    dtype: tl.constexpr = p_y.dtype.element_ty
    if INTERLEAVED:
        b_y = turned(b_x[0].to(tl.float32), b_cos, b_sin, POSITIONS, PAIRS)
        b_column, m_inside = _columns(m_row, D, 2 * PAIRS)
        tl.store(p_y + b_column, narrow(b_y, dtype), mask=m_inside)
    else:
        b_low = b_x[0].to(tl.float32)
        b_high = b_x[1].to(tl.float32)
        b_column, m_inside = _columns(m_row, D // 2, PAIRS)
        tl.store(p_y + b_column, narrow(b_low * b_cos - b_high * b_sin, dtype), mask=m_inside)
        tl.store(p_y + D // 2 + b_column, narrow(b_high * b_cos + b_low * b_sin, dtype), mask=m_inside)


@triton.jit(do_not_specialize=["T"])
def rotate(
    t_x, t_positions, p_y, T,
    H: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    POSITIONS: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """y (B, T, H, D), contiguous: x turned by its positions, or back; STEP as in `angles`."""
    groups = (H + HEADS - 1) // HEADS
    blocks = tl.cdiv(T, POSITIONS)
    index = tl.program_id(0)
    first = index % groups * HEADS
    b_t = index // groups % blocks * POSITIONS + tl.arange(0, POSITIONS)
    sequence = (index // groups // blocks).to(tl.int64)
    b_long = b_t.to(tl.int64)
    b_position = tl.load(
        t_positions[0] + sequence * t_positions[1] + b_long * t_positions[2], mask=b_t < T, other=0
    )
    b_cos, b_sin = angles(b_position, STEP, PAIRS)
    if INVERSE:
        b_sin = -b_sin
    p_row = t_x[0] + sequence * t_x[1] + b_long[:, None] * t_x[2]
    p_out = p_y + (sequence * T + b_long[:, None]) * (H * D)
    # No load waits for a store that it might read from.
    b_heads = ()
    for i in tl.static_range(HEADS):
        p_head = p_row + (first + i).to(tl.int64) * t_x[3]
        b_heads = b_heads + (_load(p_head, rows_of_head(b_t, T, first + i, H), D, INTERLEAVED, PAIRS),)
    for i in tl.static_range(HEADS):
        m_row = rows_of_head(b_t, T, first + i, H)
        _store(p_out + (first + i) * D, b_heads[i], b_cos, b_sin, m_row, D, INTERLEAVED, POSITIONS, PAIRS)
