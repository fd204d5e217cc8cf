"""Backward of attention with tangents in Triton: by blocks of queries, then by blocks of keys.

With the tangents A, B, C of Q, K, V and the cotangents X of the output and dO of its tangent O' (A, B and C None where
zero; B and C are those of the keys from key_start on),

    S' = s (A K^T + Q B^T)    dP = dO V^T    dS = P * (dP - D)    P' = P * (S' - r)
    T = P * ((S' - r) * (dP - D) + dO C^T + X V^T - E)            E = rowsum(dO * O') + rowsum(X * O)
    Q_bar = s (dS B + T K)    K_bar = s (dS^T A + T^T Q)    V_bar = P'^T dO + P^T X

and the cotangents of A, B and C are dQ = s dS K, dK = s dS^T Q and dV = P^T dO. As D = rowsum(dO * O) takes the place
of a sum over the keys in a first derivative, r and E do here: r and O' are those of the forward, so no sweep over the
keys goes before. O and O' count with what they lost to rounding.

A tile takes six products for what stands beside P: Q K^T, A K^T, Q B^T, dO V^T, dO C^T and X V^T. By queries there are
T K, dS B and dS K besides, by keys T^T Q, dS^T A, P'^T dO, P^T X, dS^T Q and P^T dO: 9 and 12, of which 15 are
different. Where its keys have no tangents a tile takes 6 and 8, of which 10 are different. The backward, double
backward and backward of attention, of which the same could be composed, take 34 and 30.
"""

import triton
import triton.language as tl

from ttt_kernels.swa.triton_backward import weights
from ttt_kernels.swa.triton_double_backward import gradients
from ttt_kernels.swa.triton_tiles import (
    add_product,
    add_product_t,
    head_from,
    head_of,
    head_or_none,
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
    before,
    behind,
    key_block,
    key_range,
    lowest_key,
    query_block,
    query_range,
    tile_start,
    tiles,
)


@triton.jit
def _query_tile(
    b_qbar, b_dq, b_q, b_a, b_do, b_x, b_lse, b_delta, b_r, b_e, x_k, x_v, x_b, x_c, i, j, p_first, low, Tq, Tk,
    window, key_start, scale,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, EDGE: tl.constexpr,
    OWN: tl.constexpr, SHIFTED: tl.constexpr, FIRST: tl.constexpr, QBAR: tl.constexpr, DQ: tl.constexpr,
):  # fmt: skip
    """Adds dS B + T K and dS K of the keys [j, j + BK), whose tangents count where OWN."""
    b_k = load_rows(x_k, j, low, Tk, BK, D, PIECES, EDGE)
    b_i = (i + tl.arange(0, BQ))[:, None]
    b_j = (j + tl.arange(0, BK))[None, :]
    b_p = weights(b_q, b_k, b_lse, b_i, b_j, p_first, low, Tq, Tk, window, scale, BQ, BK, D, EDGE)
    b_v = load_rows(x_v, j, low, Tk, BK, D, PIECES, EDGE)
    b_dp = product_t(b_do, b_v, BQ, BK, D)
    b_s1 = None
    b_b = None
    b_g = None
    if QBAR:
        if b_a is not None or x_b is not None:
            b_s1 = tl.zeros((BQ, BK), tl.float32)
            if b_a is not None:
                b_s1 = add_product_t(b_s1, b_a, b_k, D)
            if OWN and x_b is not None:
                b_b = load_rows(x_b, j, tl.maximum(low, key_start), Tk, BK, D, PIECES, EDGE or SHIFTED)
                b_s1 = add_product_t(b_s1, b_q, b_b, D)
            b_s1 = b_s1 * scale
        b_g = product_t(b_x, b_v, BQ, BK, D)
        if OWN and x_c is not None:
            b_c = load_rows(x_c, j, tl.maximum(low, key_start), Tk, BK, D, PIECES, EDGE or SHIFTED)
            b_g = add_product_t(b_g, b_do, b_c, D)
    b_ds, b_t = gradients(b_p, b_s1, b_dp, b_g, b_delta, b_r, b_e)
    if QBAR:
        b_qbar = add_product(b_qbar, b_t, b_k, D, FIRST)
        if b_b is not None:
            b_qbar = add_product(b_qbar, b_ds, b_b, D, FIRST)
    if DQ:
        b_dq = add_product(b_dq, b_ds, b_k, D, FIRST)
    return b_qbar, b_dq


@triton.jit(do_not_specialize=["Tq", "Tk", "window", "key_start"])
def queries(
    t_q, t_k, t_v, t_a, t_b, t_c, t_o, t_rest, t_odot, t_odot_rest, t_x, t_do, t_qbar, t_dq, p_lse, p_r, p_e, p_delta,
    p_lengths, p_first, scale, Tq, Tk, window, key_start, heads, group,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, SHIFTED: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """D and E; Q_bar and dQ (each unless its tensor is None), COUNT pieces of them from piece FIRST on.

    SHIFTED says whether key_start is above 0.
    """
    sequence, head, i = query_block(heads, Tq, BQ)
    row = (sequence * heads + head).to(tl.int64) * Tq
    x_o = head_of(t_o, sequence, head)
    x_rest = head_or_none(t_rest, sequence, head)
    x_odot = head_of(t_odot, sequence, head)
    x_do = head_of(t_do, sequence, head)
    x_x = head_of(t_x, sequence, head)
    b_delta = row_sums(x_o, x_rest, x_do, i, Tq, BQ, D, PIECES)
    b_e = row_sums(x_odot, head_or_none(t_odot_rest, sequence, head), x_do, i, Tq, BQ, D, PIECES)
    b_e += row_sums(x_o, x_rest, x_x, i, Tq, BQ, D, PIECES)
    store_statistic(p_delta + row, b_delta, i, Tq, BQ)
    store_statistic(p_e + row, b_e, i, Tq, BQ)
    if t_qbar is not None or t_dq is not None:
        low = lowest_key(p_lengths, sequence, Tk)
        x_k = head_of(t_k, sequence, head // group)
        x_v = head_of(t_v, sequence, head // group)
        x_b = head_from(t_b, sequence, head // group, key_start)
        x_c = head_from(t_c, sequence, head // group, key_start)
        b_q = load_block(head_of(t_q, sequence, head), i, 0, Tq, BQ, D, PIECES)
        b_do = load_block(x_do, i, 0, Tq, BQ, D, PIECES)
        b_x = load_block(x_x, i, 0, Tq, BQ, D, PIECES)
        b_a = None
        if t_a is not None:
            b_a = load_block(head_of(t_a, sequence, head), i, 0, Tq, BQ, D, PIECES)
        b_lse = load_statistic(p_lse + row, i, Tq, float("inf"), BQ, True)[:, None]
        b_r = load_statistic(p_r + row, i, Tq, 0.0, BQ, True)[:, None]
        every = key_range(i, p_first, low, Tq, Tk, window, BQ, BK)
        b_qbar = zero_rows(BQ, PIECES, FIRST, COUNT)
        b_dq = zero_rows(BQ, PIECES, FIRST, COUNT)
        for OWN in tl.static_range(1 - SHIFTED, 2):
            span = behind(every, key_start // BK * BK, BK) if OWN else before(every, key_start // BK * BK, BK)
            for EDGE in tl.static_range(2):
                for index in tl.range(tiles(span, BK, EDGE), disable_licm=True):
                    b_qbar, b_dq = _query_tile(
                        b_qbar, b_dq, b_q, b_a, b_do, b_x, b_lse, b_delta[:, None], b_r, b_e[:, None], x_k, x_v,
                        x_b, x_c, i, tile_start(span, index, BK, EDGE), p_first, low, Tq, Tk, window, key_start, scale,
                        BQ, BK, D, PIECES, EDGE, OWN, SHIFTED, FIRST, t_qbar is not None, t_dq is not None,
                    )  # fmt: skip
        if t_qbar is not None:
            store_rows(head_of(t_qbar, sequence, head), scaled(b_qbar, scale), i, Tq, BQ, D, PIECES, FIRST)
        if t_dq is not None:
            store_rows(head_of(t_dq, sequence, head), scaled(b_dq, scale), i, Tq, BQ, D, PIECES, FIRST)


@triton.jit
def _key_tile(
    b_kbar, b_vbar, b_dk, b_dv, b_k, b_v, b_b, b_c, x_q, x_a, x_x, x_do, p_lse, p_r, p_e, p_delta, i, j, p_first, low,
    Tq, Tk, window, scale,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, EDGE: tl.constexpr, MOVES: tl.constexpr,
    FIRST: tl.constexpr, KBAR: tl.constexpr, VBAR: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Adds dS^T A + T^T Q, P'^T dO + P^T X, dS^T Q and P^T dO of the queries [i, i + BQ).

    Tiles stand as (keys, queries).
    """
    b_q = load_rows(x_q, i, 0, Tq, BQ, D, PIECES, EDGE)
    b_lse = load_statistic(p_lse, i, Tq, float("inf"), BQ, EDGE)[None, :]
    b_r = load_statistic(p_r, i, Tq, 0.0, BQ, EDGE)[None, :]
    b_i = (i + tl.arange(0, BQ))[None, :]
    b_j = (j + tl.arange(0, BK))[:, None]
    b_p = weights(b_k, b_q, b_lse, b_i, b_j, p_first, low, Tq, Tk, window, scale, BK, BQ, D, EDGE)
    b_do = load_rows(x_do, i, 0, Tq, BQ, D, PIECES, EDGE)
    if DV:
        b_dv = add_product(b_dv, b_p, b_do, D, FIRST)
    b_s1 = None
    b_a = None
    b_x = None
    if KBAR or VBAR:
        if MOVES:
            # Zero where keys have no tangents and queries neither; r need not be.
            b_s1 = tl.zeros((BK, BQ), tl.float32)
            if x_a is not None:
                b_a = load_rows(x_a, i, 0, Tq, BQ, D, PIECES, EDGE)
                b_s1 = add_product_t(b_s1, b_k, b_a, D)
            if b_b is not None:
                b_s1 = add_product_t(b_s1, b_b, b_q, D)
            b_s1 = b_s1 * scale
        b_x = load_rows(x_x, i, 0, Tq, BQ, D, PIECES, EDGE)
    if VBAR:
        b_vbar = add_product(b_vbar, b_p, b_x, D, FIRST)
        if b_s1 is not None:
            b_vbar = add_product(b_vbar, b_p * (b_s1 - b_r), b_do, D, FIRST)
    if KBAR or DK:
        b_e = load_statistic(p_e, i, Tq, 0.0, BQ, EDGE)[None, :]
        b_delta = load_statistic(p_delta, i, Tq, 0.0, BQ, EDGE)[None, :]
        b_dp = product_t(b_v, b_do, BK, BQ, D)
        b_g = None
        if KBAR:
            b_g = product_t(b_v, b_x, BK, BQ, D)
            if b_c is not None:
                b_g = add_product_t(b_g, b_c, b_do, D)
        b_ds, b_t = gradients(b_p, b_s1, b_dp, b_g, b_delta, b_r, b_e)
        if DK:
            b_dk = add_product(b_dk, b_ds, b_q, D, FIRST)
        if KBAR:
            b_kbar = add_product(b_kbar, b_t, b_q, D, FIRST)
            if b_a is not None:
                b_kbar = add_product(b_kbar, b_ds, b_a, D, FIRST)
    return b_kbar, b_vbar, b_dk, b_dv


@triton.jit(do_not_specialize=["Tq", "Tk", "window", "key_start", "first", "end"])
def keys(
    t_q, t_k, t_v, t_a, t_b, t_c, t_x, t_do, t_kbar, t_vbar, t_dk, t_dv, p_lse, p_r, p_e, p_delta,
    p_lengths, p_first, p_end, scale, Tq, Tk, window, key_start, first, end, heads, group,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, MOVES: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """K_bar, V_bar, dK and dV (each unless its tensor is None) of the keys from `first` to `end`.

    COUNT pieces of them from piece FIRST on. B, C, dK and dV begin at key_start, and so must `first` with any of them.
    MOVES says whether S' of any key are other than zero.
    """
    sequence, kv_head, j = key_block(heads // group, first, end, BK)
    low = lowest_key(p_lengths, sequence, Tk)
    b_k = load_block(head_of(t_k, sequence, kv_head), j, low, Tk, BK, D, PIECES)
    b_v = load_block(head_of(t_v, sequence, kv_head), j, low, Tk, BK, D, PIECES)
    b_b = None
    if t_b is not None:
        b_b = load_block(head_from(t_b, sequence, kv_head, key_start), j, low, Tk, BK, D, PIECES)
    b_c = None
    if t_c is not None:
        b_c = load_block(head_from(t_c, sequence, kv_head, key_start), j, low, Tk, BK, D, PIECES)
    span = query_range(j, p_end, low, Tq, Tk, window, BQ, BK)
    b_kbar = zero_rows(BK, PIECES, FIRST, COUNT)
    b_vbar = zero_rows(BK, PIECES, FIRST, COUNT)
    b_dk = zero_rows(BK, PIECES, FIRST, COUNT)
    b_dv = zero_rows(BK, PIECES, FIRST, COUNT)
    for member in range(group):
        head = kv_head * group + member
        row = (sequence * heads + head).to(tl.int64) * Tq
        x_q = head_of(t_q, sequence, head)
        x_do = head_of(t_do, sequence, head)
        x_x = head_of(t_x, sequence, head)
        x_a = head_or_none(t_a, sequence, head)
        for EDGE in tl.static_range(2):
            for index in tl.range(tiles(span, BQ, EDGE), disable_licm=True):
                b_kbar, b_vbar, b_dk, b_dv = _key_tile(
                    b_kbar, b_vbar, b_dk, b_dv, b_k, b_v, b_b, b_c, x_q, x_a, x_x, x_do, p_lse + row, p_r + row,
                    row_or_none(p_e, row), row_or_none(p_delta, row), tile_start(span, index, BQ, EDGE), j,
                    p_first, low, Tq, Tk, window, scale, BQ, BK, D, PIECES, EDGE, MOVES, FIRST,
                    t_kbar is not None, t_vbar is not None, t_dk is not None, t_dv is not None,
                )  # fmt: skip
    if t_kbar is not None:
        store_rows(head_of(t_kbar, sequence, kv_head), scaled(b_kbar, scale), j, end, BK, D, PIECES, FIRST)
    if t_vbar is not None:
        store_rows(head_of(t_vbar, sequence, kv_head), b_vbar, j, end, BK, D, PIECES, FIRST)
    if t_dk is not None:
        x_dk = head_from(t_dk, sequence, kv_head, key_start)
        store_rows(x_dk, scaled(b_dk, scale), j, end, BK, D, PIECES, FIRST)
    if t_dv is not None:
        store_rows(head_from(t_dv, sequence, kv_head, key_start), b_dv, j, end, BK, D, PIECES, FIRST)
