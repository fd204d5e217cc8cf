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
def _first(t, sequence, start):
    """The address of row `start` of a sequence's matrix."""
    return t[0] + sequence.to(tl.int64) * t[1] + start.to(tl.int64) * t[2]


@triton.jit
def _steps(t, left, ROWS: tl.constexpr):
    """From a row to it and those after it, of which the `left`th and all beyond are the last again."""
    # Only the steps to the sequence and to the tile can be beyond 32 bits; within a tile, the launch sees to it.
    return tl.minimum(tl.arange(0, ROWS), left - 1) * t[2]


@triton.jit
def _load(p_first, b_step, left, MASKED: tl.constexpr, AXIS: tl.constexpr):
    """Values at steps from an address; where MASKED, zeros along an axis from place `left` on."""
    if MASKED:
        b_k = tl.expand_dims(tl.arange(0, b_step.shape[AXIS]), 1 - AXIS)
        return tl.load(p_first + b_step, mask=b_k < left, other=0.0)
    else:
        return tl.load(p_first + b_step)


@triton.jit(do_not_specialize=["rows", "columns", "width"])
def gate_and_up(
    t_x, t_wg, t_wu, p_hidden, p_gate, p_up, rows, columns, width,
    WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """G = x Wg^T and U = x Wu^T of (B, rows, width) and (B, columns, width), and H = silu(G) U before they are rounded.

    columns and width are multiples of 16. WHOLE: width is one of BK.
    """
    # The same numbers, but the compiler sees what divides them, and makes accesses of 16 bytes.
    columns = columns // 16 * 16
    width = width // 16 * 16
    sequence, i, j = _place(rows, columns, BM, BN)
    b_k = tl.arange(0, BK)
    p_x = _first(t_x, sequence, i)
    p_wg = _first(t_wg, sequence, j)
    p_wu = _first(t_wu, sequence, j)
    b_x_step = _steps(t_x, rows - i, BM)[:, None] + b_k[None, :]
    b_wg_step = _steps(t_wg, columns - j, BN)[None, :] + b_k[:, None]
    b_wu_step = _steps(t_wu, columns - j, BN)[None, :] + b_k[:, None]
    b_g = tl.zeros((BM, BN), tl.float32)
    b_u = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, width, BK):
        b_x = _load(p_x + k, b_x_step, width - k, not WHOLE, 1)
        b_g = dot(b_x, _load(p_wg + k, b_wg_step, width - k, not WHOLE, 0), b_g)
        b_u = dot(b_x, _load(p_wu + k, b_wu_step, width - k, not WHOLE, 0), b_u)
    first = (sequence.to(tl.int64) * rows + i) * columns + j
    b_i = tl.arange(0, BM)[:, None]
    b_j = tl.arange(0, BN)[None, :]
    b_step = b_i * columns + b_j
    m_in = (b_i < rows - i) & (b_j < columns - j)
    tl.store(p_gate + first + b_step, narrow(b_g, p_gate.dtype.element_ty), mask=m_in)
    tl.store(p_up + first + b_step, narrow(b_u, p_up.dtype.element_ty), mask=m_in)
    b_h = b_g * tl.sigmoid(b_g) * b_u
    tl.store(p_hidden + first + b_step, narrow(b_h, p_hidden.dtype.element_ty), mask=m_in)
