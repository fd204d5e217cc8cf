"""The two products of SwiGLU's forward in one Triton kernel, which reads x once and writes H beside G and U."""

import triton
import triton.language as tl

from ttt_kernels.triton_values import dot, narrow

_TALL = tl.constexpr(8)
"""As many tiles below each other follow one another, so that those that run together share rows of weights."""


@triton.jit
def _place(rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """The program's sequence, and the first row and column of its tile."""
    down = tl.cdiv(rows, BM)
    across = tl.cdiv(columns, BN)
    tile = tl.program_id(0) % (down * across)
    top = tile // (_TALL * across) * _TALL
    height = tl.minimum(down - top, _TALL)
    inside = tile % (_TALL * across)
    return tl.program_id(0) // (down * across), (top + inside % height) * BM, inside // height * BN


@triton.jit
def _rows_from(t, sequence, start, high, ROWS: tl.constexpr):
    """Addresses of rows [start, start + ROWS) of a sequence's matrix; those from `high` on are the last again."""
    b_row = tl.minimum(tl.arange(0, ROWS), high - 1 - start)
    # Only the steps to the sequence and to the tile can be beyond 32 bits; within a tile, the launch sees to it.
    return t[0] + sequence.to(tl.int64) * t[1] + start.to(tl.int64) * t[2] + b_row * t[2]


@triton.jit
def _load(p_x, left, MASKED: tl.constexpr, AXIS: tl.constexpr):
    """Values at addresses; where MASKED, zeros along an axis from place `left` on."""
    if MASKED:
        b_k = tl.expand_dims(tl.arange(0, p_x.shape[AXIS]), 1 - AXIS)
        return tl.load(p_x, mask=b_k < left, other=0.0)
    else:
        return tl.load(p_x)


@triton.jit(do_not_specialize=["rows"])
def gate_and_up(
    t_x, t_wg, t_wu, p_hidden, p_gate, p_up, rows, columns, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """G = x Wg^T and U = x Wu^T of (B, rows, D) and (B, columns, D), rounded, and H = silu(G) U of the exact ones."""
    sequence, i, j = _place(rows, columns, BM, BN)
    b_k = tl.arange(0, BK)
    p_x = _rows_from(t_x, sequence, i, rows, BM)[:, None] + b_k[None, :]
    p_wg = _rows_from(t_wg, sequence, j, columns, BN)[None, :] + b_k[:, None]
    p_wu = _rows_from(t_wu, sequence, j, columns, BN)[None, :] + b_k[:, None]
    b_g = tl.zeros((BM, BN), tl.float32)
    b_u = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, D, BK):
        b_x = _load(p_x + k, D - k, D % BK != 0, 1)
        b_g = dot(b_x, _load(p_wg + k, D - k, D % BK != 0, 0), b_g)
        b_u = dot(b_x, _load(p_wu + k, D - k, D % BK != 0, 0), b_u)
    b_h = b_g * tl.sigmoid(b_g) * b_u
    b_i = i + tl.arange(0, BM)
    b_j = j + tl.arange(0, BN)
    first = (sequence.to(tl.int64) * rows + i) * columns
    b_place = (tl.arange(0, BM) * columns)[:, None] + b_j[None, :]
    m_in = (b_i < rows)[:, None] & (b_j < columns)[None, :]
    tl.store(p_hidden + first + b_place, narrow(b_h, p_hidden.dtype.element_ty), mask=m_in)
    tl.store(p_gate + first + b_place, narrow(b_g, p_gate.dtype.element_ty), mask=m_in)
    tl.store(p_up + first + b_place, narrow(b_u, p_up.dtype.element_ty), mask=m_in)
