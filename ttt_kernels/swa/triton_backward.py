"""Attention's backward in Triton: dQ by blocks of queries, dK and dV by blocks of keys.

Both recompute P from lse. Nothing is added to by two programs, so results are the same bits every time.
"""

import triton
import triton.language as tl

from ttt_kernels.swa.triton_tiles import (
    LOG2E,
    add_product,
    head_of,
    head_or_none,
    in_memory,
    load_block,
    load_rows,
    load_statistic,
    product_t,
    row_or_none,
    row_sums,
    scaled,
    store_rows,
    store_statistic,
    zero_rows,
)
from ttt_kernels.swa.triton_visible import (
    key_block,
    key_range,
    lowest_key,
    query_block,
    query_range,
    tile_start,
    tiles,
    where_seen,
)


@triton.jit
def weights(
    b_x, b_y, b_lse, b_i, b_j, p_first, low, Tq, Tk, window, scale,
    X: tl.constexpr, Y: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """P (X, Y) from rows of Q and K, in whichever order, and lse and the indices, which have shapes that broadcast.

    At most 1, however far rounding brings scores that are huge above their lse.
    """
    b_s = product_t(b_x, b_y, X, Y, D)
    if in_memory(b_x[0].dtype):
        # In float32 the rounding of large numbers to another unit would show.
        b_s = b_s * scale - b_lse
        b_s = b_s * LOG2E
    else:
        b_s = b_s * (scale * LOG2E) - b_lse * LOG2E
    b_p = tl.exp2(tl.minimum(b_s, 0.0, propagate_nan=tl.PropagateNan.ALL))
    if EDGE:
        b_p = where_seen(b_p, False, b_i, b_j, p_first, low, Tq, Tk, window)
    return b_p


@triton.jit
def _query_tile(
    b_dq, b_q, b_do, b_lse, b_delta, x_k, x_v, i, j, p_first, low, Tq, Tk, window, scale,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds dS K of the keys [j, j + BK)."""
    b_k = load_rows(x_k, j, low, Tk, BK, D, PIECES, EDGE)
    b_i = (i + tl.arange(0, BQ))[:, None]
    b_j = (j + tl.arange(0, BK))[None, :]
    b_p = weights(b_q, b_k, b_lse[:, None], b_i, b_j, p_first, low, Tq, Tk, window, scale, BQ, BK, D, EDGE)
    b_dp = product_t(b_do, load_rows(x_v, j, low, Tk, BK, D, PIECES, EDGE), BQ, BK, D)
    return add_product(b_dq, b_p * (b_dp - b_delta[:, None]), b_k, D)


@triton.jit(do_not_specialize=["Tq", "Tk", "window"])
def queries(
    t_q, t_k, t_v, t_o, t_rest, t_do, t_dq, p_lse, p_delta, p_lengths, p_first, scale, Tq, Tk, window, heads, group,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """dQ (unless t_dq is None) and D = rowsum(dO * O) (unless p_delta is None)."""
    sequence, head, i = query_block(heads, Tq, BQ)
    row = (sequence * heads + head).to(tl.int64) * Tq
    x_o = head_of(t_o, sequence, head)
    x_do = head_of(t_do, sequence, head)
    b_delta = row_sums(x_o, head_or_none(t_rest, sequence, head), x_do, i, Tq, BQ, D, PIECES)
    if p_delta is not None:
        store_statistic(p_delta + row, b_delta, i, Tq, BQ)
    if t_dq is not None:
        low = lowest_key(p_lengths, sequence, Tk)
        x_k = head_of(t_k, sequence, head // group)
        x_v = head_of(t_v, sequence, head // group)
        b_q = load_block(head_of(t_q, sequence, head), i, 0, Tq, BQ, D, PIECES)
        b_do = load_block(x_do, i, 0, Tq, BQ, D, PIECES)
        b_lse = load_statistic(p_lse + row, i, Tq, float("inf"), BQ, True)
        span = key_range(i, p_first, low, Tq, Tk, window, BQ, BK)
        b_dq = zero_rows(BQ, PIECES)
        for EDGE in tl.static_range(2):
            for index in tl.range(tiles(span, BK, EDGE), disable_licm=True):
                b_dq = _query_tile(
                    b_dq, b_q, b_do, b_lse, b_delta, x_k, x_v, i, tile_start(span, index, BK, EDGE), p_first,
                    low, Tq, Tk, window, scale, BQ, BK, D, PIECES, EDGE,
                )  # fmt: skip
        store_rows(head_of(t_dq, sequence, head), scaled(b_dq, scale), i, Tq, BQ, D, PIECES)


@triton.jit
def _key_tile(
    b_dk, b_dv, b_k, b_v, x_q, x_do, p_lse, p_delta, i, j, p_first, low, Tq, Tk, window, scale,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, EDGE: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Adds dS^T Q and P^T dO of the queries [i, i + BQ). Tiles stand as (keys, queries)."""
    b_q = load_rows(x_q, i, 0, Tq, BQ, D, PIECES, EDGE)
    b_lse = load_statistic(p_lse, i, Tq, float("inf"), BQ, EDGE)[None, :]
    b_i = (i + tl.arange(0, BQ))[None, :]
    b_j = (j + tl.arange(0, BK))[:, None]
    b_p = weights(b_k, b_q, b_lse, b_i, b_j, p_first, low, Tq, Tk, window, scale, BK, BQ, D, EDGE)
    b_do = load_rows(x_do, i, 0, Tq, BQ, D, PIECES, EDGE)
    if DV:
        b_dv = add_product(b_dv, b_p, b_do, D)
    if DK:
        b_delta = load_statistic(p_delta, i, Tq, 0.0, BQ, EDGE)[None, :]
        b_dk = add_product(b_dk, b_p * (product_t(b_v, b_do, BK, BQ, D) - b_delta), b_q, D)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["Tq", "Tk", "window", "key_start"])
def keys(
    t_q, t_k, t_v, t_do, t_dk, t_dv, p_lse, p_delta, p_lengths, p_first, p_end, scale, Tq, Tk, window,
    key_start, heads, group,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """dK and dV (each unless its tensor is None) of the keys from key_start on."""
    sequence, kv_head, j = key_block(heads // group, key_start, Tk, BK)
    low = lowest_key(p_lengths, sequence, Tk)
    b_k = load_block(head_of(t_k, sequence, kv_head), j, low, Tk, BK, D, PIECES)
    b_v = load_block(head_of(t_v, sequence, kv_head), j, low, Tk, BK, D, PIECES)
    span = query_range(j, p_end, low, Tq, Tk, window, BQ, BK)
    b_dk = zero_rows(BK, PIECES)
    b_dv = zero_rows(BK, PIECES)
    for member in range(group):
        head = kv_head * group + member
        row = (sequence * heads + head).to(tl.int64) * Tq
        x_q = head_of(t_q, sequence, head)
        x_do = head_of(t_do, sequence, head)
        for EDGE in tl.static_range(2):
            for index in tl.range(tiles(span, BQ, EDGE), disable_licm=True):
                b_dk, b_dv = _key_tile(
                    b_dk, b_dv, b_k, b_v, x_q, x_do, p_lse + row, row_or_none(p_delta, row),
                    tile_start(span, index, BQ, EDGE), j, p_first, low, Tq, Tk, window, scale,
                    BQ, BK, D, PIECES, EDGE, t_dk is not None, t_dv is not None,
                )  # fmt: skip
    if t_dk is not None:
        x_dk = head_of(t_dk, sequence, kv_head)
        store_rows(x_dk, scaled(b_dk, scale), j - key_start, Tk - key_start, BK, D, PIECES)
    if t_dv is not None:
        store_rows(head_of(t_dv, sequence, kv_head), b_dv, j - key_start, Tk - key_start, BK, D, PIECES)
