"""Attention and its derivative along tangents in Triton, in one pass over the keys with its softmax online.

With tangents A, B, C of Q, K, V (None where zero; B and C are those of the keys from key_start on),

    S' = s (A K^T + Q B^T)        r = rowsum(P * S')        O' = (P * (S' - r)) V + P C

A tile takes six products: Q K^T, A K^T, Q B^T, P V, (P * S') V and P C; four where its keys have no tangents.

r is not known before the last key. The sums are of S' - n, where n is the mean of S' over the keys so far, weighted
with P: when it moves by d, a sum of (P * (S' - n)) V becomes one about the new mean by d P V, and P V is at hand. So
what is rounded for a product is as large as S' differ, however large what all S' of a row have in common is.
"""

import triton
import triton.language as tl

from ttt_kernels.swa.triton_forward import ended, softmax_tile
from ttt_kernels.swa.triton_tiles import (
    add_product,
    add_product_t,
    head_from,
    head_of,
    load_block,
    load_rows,
    rest,
    scaled,
    settle,
    store_piece,
    store_statistic,
    zero_rows,
)
from ttt_kernels.swa.triton_visible import (
    before,
    behind,
    key_range,
    lowest_key,
    query_block,
    tile_start,
    tiles,
)


@triton.jit
def _less(b_x, b_y, b_factor):
    """Rows in pieces, X - factor * Y with one factor a row (ROWS, 1)."""
    b_out = ()
    for i in tl.static_range(len(b_x)):
        b_out = b_out + (b_x[i] - b_factor * b_y[i],)
    return b_out


@triton.jit
def _tile(
    b_o, b_m, b_max, b_sum, b_near, b_q, b_a, x_k, x_v, x_b, x_c, i, j, p_first, low, Tq, Tk, window, key_start,
    scale,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, EDGE: tl.constexpr,
    OWN: tl.constexpr, SHIFTED: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Adds the keys [j, j + BK), whose tangents count where OWN, to P V and M = (P * (S' - n)) V + P C."""
    b_k = load_rows(x_k, j, low, Tk, BK, D, PIECES, EDGE)
    b_p, b_decay, b_max, b_sum = softmax_tile(
        b_max, b_sum, b_q, b_k, i, j, p_first, low, Tq, Tk, window, scale, BQ, BK, D, EDGE
    )
    b_o = scaled(b_o, b_decay[:, None])
    b_m = scaled(b_m, b_decay[:, None])
    b_v = load_rows(x_v, j, low, Tk, BK, D, PIECES, EDGE)
    if b_a is not None or x_b is not None:
        b_s1 = tl.zeros((BQ, BK), tl.float32)
        if b_a is not None:
            b_s1 = add_product_t(b_s1, b_a, b_k, D)
        if OWN and x_b is not None:
            b_b = load_rows(x_b, j, tl.maximum(low, key_start), Tk, BK, D, PIECES, EDGE or SHIFTED)
            b_s1 = add_product_t(b_s1, b_q, b_b, D)
        b_s1 = b_s1 * scale - b_near[:, None]
        b_moved = b_near + tl.sum(b_p * b_s1, 1) / tl.where(b_sum == 0, 1.0, b_sum)
        # As it is after rounding, so that what is about the mean is about this number exactly.
        b_shift = b_moved - b_near
        b_ps1 = b_p * (b_s1 - b_shift[:, None])
        b_m = add_product(_less(b_m, b_o, b_shift[:, None]), b_ps1, b_v, D, FIRST)
        b_near = b_moved
    b_o = add_product(b_o, b_p, b_v, D, FIRST)
    if OWN and x_c is not None:
        b_c = load_rows(x_c, j, tl.maximum(low, key_start), Tk, BK, D, PIECES, EDGE or SHIFTED)
        b_m = add_product(b_m, b_p, b_c, D, FIRST)
    return b_o, b_m, b_max, b_sum, b_near


@triton.jit(do_not_specialize=["Tq", "Tk", "window", "key_start"])
def attention(
    t_q, t_k, t_v, t_a, t_b, t_c, t_o, t_rest, t_odot, t_odot_rest, p_lse, p_r, p_lengths, p_first,
    scale, Tq, Tk, window, key_start, heads, group,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, SHIFTED: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """lse and r; O and O' and what each loses to rounding (unless its tensor is None), COUNT pieces from FIRST on.

    `scale` is positive. SHIFTED says whether key_start is above 0.
    """
    sequence, head, i = query_block(heads, Tq, BQ)
    low = lowest_key(p_lengths, sequence, Tk)
    x_k = head_of(t_k, sequence, head // group)
    x_v = head_of(t_v, sequence, head // group)
    x_b = head_from(t_b, sequence, head // group, key_start)
    x_c = head_from(t_c, sequence, head // group, key_start)
    b_q = load_block(head_of(t_q, sequence, head), i, 0, Tq, BQ, D, PIECES)
    b_a = None
    if t_a is not None:
        b_a = load_block(head_of(t_a, sequence, head), i, 0, Tq, BQ, D, PIECES)
    every = key_range(i, p_first, low, Tq, Tk, window, BQ, BK)
    b_o = zero_rows(BQ, PIECES, FIRST, COUNT)
    b_m = zero_rows(BQ, PIECES, FIRST, COUNT)
    b_max = tl.full((BQ,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BQ,), tl.float32)
    b_near = tl.zeros((BQ,), tl.float32)
    for OWN in tl.static_range(1 - SHIFTED, 2):
        span = behind(every, key_start // BK * BK, BK) if OWN else before(every, key_start // BK * BK, BK)
        for EDGE in tl.static_range(2):
            for index in tl.range(tiles(span, BK, EDGE), disable_licm=True):
                b_o, b_m, b_max, b_sum, b_near = _tile(
                    b_o, b_m, b_max, b_sum, b_near, b_q, b_a, x_k, x_v, x_b, x_c, i,
                    tile_start(span, index, BK, EDGE), p_first, low, Tq, Tk, window, key_start, scale,
                    BQ, BK, D, PIECES, EDGE, OWN, SHIFTED, FIRST,
                )  # fmt: skip
    b_share, b_lse = ended(b_max, b_sum, b_q)
    row = (sequence * heads + head).to(tl.int64) * Tq
    store_statistic(p_lse + row, b_lse, i, Tq, BQ)
    store_statistic(p_r + row, b_near, i, Tq, BQ)
    for piece in tl.static_range(COUNT):
        b_piece = b_o[piece] * b_share[:, None]
        _store_both(t_o, t_rest, b_piece, sequence, head, i, Tq, FIRST + piece, BQ, D, PIECES)
        b_piece = b_m[piece] * b_share[:, None]
        _store_both(t_odot, t_odot_rest, b_piece, sequence, head, i, Tq, FIRST + piece, BQ, D, PIECES)
        settle()


@triton.jit
def _store_both(
    t, t_rest, b_piece, sequence, head, i, Tq, piece: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Stores a piece of rows and, unless t_rest is None, what it loses to rounding."""
    store_piece(head_of(t, sequence, head), b_piece, i, Tq, piece, BQ, D, PIECES)
    if t_rest is not None:
        b_lost = rest(b_piece, t[0].dtype.element_ty)
        store_piece(head_of(t_rest, sequence, head), b_lost, i, Tq, piece, BQ, D, PIECES)
