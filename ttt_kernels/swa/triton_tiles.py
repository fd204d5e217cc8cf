"""Tiles of rows in Triton kernels: how they are loaded, multiplied and stored.

Names in kernels: `t_` a tensor with its strides, `x_` one head of it (address of its first row, stride of the
rows), `p_` an address, `b_` the values of a block, `m_` a mask; `BQ` and `BK` the queries and keys of a tile; `D`
the head dimension and `PIECES` the powers of two that it is divided into, because blocks have no other sizes:
80 = 64 + 16. Rows of D values are tuples with a block of values for each piece; but rows of float32 factors, whose
exact products have no tensor cores to feed from shared memory, are a tuple that says where they are (`in_memory`), and
each product loads a piece at a time: held in registers, several tensors of wide rows would overflow them.
"""

import triton
import triton.language as tl

from ttt_kernels.triton_values import INTERPRETED, dot, narrow

LOG2E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def column(pieces, i):
    """The column at which piece i begins."""
    return sum(pieces[:i])


@triton.constexpr_function
def size(pieces, i):
    """The columns of piece i."""
    return pieces[i]


@triton.jit
def head_of(t, sequence, head):
    """One head of a sequence: the address of its first row and the stride of its rows."""
    return t[0] + sequence.to(tl.int64) * t[1] + head.to(tl.int64) * t[3], t[2]


@triton.jit
def head_or_none(t, sequence, head):
    """`head_of` a tensor that may be missing."""
    if t is None:
        # Triton 3.6 cannot return a None that is written out.
        return
    else:
        return head_of(t, sequence, head)


@triton.jit
def head_from(t, sequence, head, start):
    """`head_of` a tensor whose first row counts as row `start`; None for a tensor that is missing."""
    if t is None:
        return
    else:
        p_first, stride = head_of(t, sequence, head)
        return p_first - tl.cast(start, tl.int64) * stride, stride


@triton.jit
def row_or_none(p_x, row):
    """The address of a row of statistics that may be missing."""
    if p_x is None:
        return
    else:
        return p_x + row


@triton.jit
def _row_addresses(x, start, ROWS: tl.constexpr):
    # Only the step to the tile can be beyond 32 bits; within a tile, the launch sees to it.
    return x[0] + tl.cast(start, tl.int64) * x[1] + (tl.arange(0, ROWS) * x[1])[:, None]


@triton.jit
def load_piece(
    x, start, low, high, i: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Piece i of rows [start, start + ROWS); where MASKED, zeros for those outside [low, high)."""
    b_column = column(PIECES, i) + tl.arange(0, size(PIECES, i))
    p_piece = _row_addresses(x, start, ROWS) + b_column[None, :]
    b_row = start + tl.arange(0, ROWS)
    m_row = ((b_row >= low) & (b_row < high))[:, None]
    if column(PIECES, i + 1) > D:
        m_column = (b_column < D)[None, :]
        if MASKED:
            m_column = m_column & m_row
        return tl.load(p_piece, mask=m_column, other=0.0)
    elif MASKED:
        return tl.load(p_piece, mask=m_row, other=0.0)
    else:
        return tl.load(p_piece)


@triton.jit
def load_rows(
    x, start, low, high, ROWS: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, MASKED: tl.constexpr
):
    """Rows [start, start + ROWS); zeros for those outside [low, high), where MASKED or float32."""
    if x[0].dtype.element_ty == tl.float32:
        return x[0], x[1], tl.cast(start, tl.int32), tl.cast(low, tl.int32), tl.cast(high, tl.int32)
    else:
        b_x = ()
        for i in tl.static_range(len(PIECES)):
            b_x = b_x + (load_piece(x, start, low, high, i, ROWS, D, PIECES, MASKED),)
        return b_x


@triton.constexpr_function
def in_memory(dtype):
    """Whether rows with a first element of this type are where they are, and not a tuple of blocks."""
    return dtype.is_ptr()


@triton.jit
def _load_columns(b_x, first, ROWS: tl.constexpr, D: tl.constexpr):
    """16 columns of located rows from column `first` on."""
    b_column = first + tl.arange(0, 16)
    b_row = b_x[2] + tl.arange(0, ROWS)
    m_piece = ((b_row >= b_x[3]) & (b_row < b_x[4]))[:, None] & (b_column < D)[None, :]
    return tl.load(_row_addresses(b_x, b_x[2], ROWS) + b_column[None, :], mask=m_piece, other=0.0)


@triton.jit
def settle():
    """Keeps the compiler from beginning later loads before what it has loaded is used or in shared memory.

    Several whole tensors at once overflow the registers (measured on sm_90 with rows of 128: 344 bytes spilled).
    """
    if not INTERPRETED:
        tl.debug_barrier()


@triton.jit
def load_block(x, start, low, high, ROWS: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr):
    """The rows that a program keeps: `load_rows`, masked, one tensor at a time."""
    b_x = load_rows(x, start, low, high, ROWS, D, PIECES, True)
    settle()
    return b_x


@triton.jit
def store_piece(
    x, b_piece, start, high, i: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr
):
    """Stores piece i of float32 rows [start, start + ROWS) that are below `high` in the tensor's dtype."""
    b_column = column(PIECES, i) + tl.arange(0, size(PIECES, i))
    p_piece = _row_addresses(x, start, ROWS) + b_column[None, :]
    m_piece = ((start + tl.arange(0, ROWS)) < high)[:, None]
    if column(PIECES, i + 1) > D:
        m_piece = m_piece & (b_column < D)[None, :]
    tl.store(p_piece, narrow(b_piece, x[0].dtype.element_ty), mask=m_piece)


@triton.jit
def store_rows(
    x, b_x, start, high, ROWS: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, FIRST: tl.constexpr = 0
):
    """Stores float32 rows [start, start + ROWS) that are below `high` in the tensor's dtype, from piece FIRST on."""
    for i in tl.static_range(len(b_x)):
        store_piece(x, b_x[i], start, high, FIRST + i, ROWS, D, PIECES)


@triton.jit
def load_statistic(p_x, start, high, other, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Numbers [start, start + ROWS) of a vector; where MASKED, `other` for those from `high` on."""
    # Of columns 16 apart only the addresses of the first are computed; the others are constants of the instructions.
    b_high = (tl.arange(0, ROWS // 16) * 16)[:, None]
    b_low = tl.arange(0, 16)[None, :]
    p_row = (p_x + start + b_low) + b_high
    if MASKED:
        return tl.reshape(tl.load(p_row, mask=b_high + b_low < high - start, other=other), (ROWS,))
    return tl.reshape(tl.load(p_row), (ROWS,))


@triton.jit
def store_statistic(p_x, b_x, start, high, ROWS: tl.constexpr):
    """Stores the numbers [start, start + ROWS) of a vector that are below `high`."""
    b_row = start + tl.arange(0, ROWS)
    tl.store(p_x + b_row, b_x, mask=b_row < high)


@triton.jit
def _computed(b_x):
    """b_x, made before anything that follows: LLVM puts the arithmetic of all products of a tile behind their loads."""
    if INTERPRETED:
        return b_x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b_x], tl.float32, False, 1)


@triton.jit
def product_t(b_x, b_y, X: tl.constexpr, Y: tl.constexpr, D: tl.constexpr):
    """X Y^T of so many rows each, float32."""
    return add_product_t(tl.zeros((X, Y), tl.float32), b_x, b_y, D)


@triton.jit
def add_product_t(b_sum, b_x, b_y, D: tl.constexpr):
    """b_sum + X Y^T of rows."""
    if in_memory(b_x[0].dtype):
        for first in tl.range(0, D, 16):
            b_left = _load_columns(b_x, first, b_sum.shape[0], D)
            b_sum = dot(b_left, tl.trans(_load_columns(b_y, first, b_sum.shape[1], D)), b_sum)
    else:
        for i in tl.static_range(len(b_x)):
            b_sum = dot(b_x[i], tl.trans(b_y[i]), b_sum)
    return b_sum


@triton.jit
def add_product(b_sum, b_w, b_x, D: tl.constexpr, FIRST: tl.constexpr = 0):
    """Rows of sums, b_sum + W X in the pieces from FIRST on; W is rounded to X's dtype for the product."""
    b_out = ()
    if in_memory(b_x[0].dtype):
        for i in tl.static_range(len(b_sum)):
            b_product = dot(b_w, _load_columns(b_x, 16 * (FIRST + i), b_w.shape[1], D), b_sum[i])
            b_out = b_out + (_computed(b_product),)
    else:
        b_w = narrow(b_w, b_x[0].dtype)
        for i in tl.static_range(len(b_sum)):
            b_out = b_out + (dot(b_w, b_x[FIRST + i], b_sum[i]),)
    return b_out


@triton.jit
def zero_rows(ROWS: tl.constexpr, PIECES: tl.constexpr, FIRST: tl.constexpr = 0, COUNT: tl.constexpr = None):
    """Rows of float32 zeros in pieces, in COUNT of them (all where None) from piece FIRST on."""
    b_x = ()
    for i in tl.static_range(len(PIECES) if COUNT is None else COUNT):
        b_x = b_x + (tl.zeros((ROWS, size(PIECES, FIRST + i)), tl.float32),)
    return b_x


@triton.jit
def scaled(b_x, b_factor):
    """Rows in pieces times a factor, or times one factor a row (ROWS, 1)."""
    b_out = ()
    for i in tl.static_range(len(b_x)):
        b_out = b_out + (b_x[i] * b_factor,)
    return b_out


@triton.jit
def rest(b_x, dtype: tl.constexpr):
    """What float32 values lose when they are rounded to `dtype`."""
    return b_x - narrow(b_x, dtype).to(tl.float32)


@triton.jit
def load_whole(
    x, x_rest, start, high, i: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr
):
    """Piece i of rows [start, start + ROWS) and of their rest, which may be None, added in float32."""
    b_piece = load_piece(x, start, 0, high, i, ROWS, D, PIECES, True).to(tl.float32)
    if x_rest is not None:
        b_piece += load_piece(x_rest, start, 0, high, i, ROWS, D, PIECES, True).to(tl.float32)
    return b_piece


@triton.jit
def row_sum(b_x, b_y):
    """rowsum(X * Y) of one piece, float32 (ROWS,)."""
    return tl.sum(b_x.to(tl.float32) * b_y.to(tl.float32), 1)


@triton.jit
def row_sums(x_x, x_rest, x_y, start, high, ROWS: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr):
    """rowsum(X * Y) of rows [start, start + ROWS) in memory, float32 (ROWS,), a piece at a time.

    X has a rest or None, as in `load_whole`.
    """
    b_sum = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(len(PIECES)):
        b_x = load_whole(x_x, x_rest, start, high, i, ROWS, D, PIECES)
        b_sum += row_sum(b_x, load_piece(x_y, start, 0, high, i, ROWS, D, PIECES, True))
        settle()
    return b_sum
