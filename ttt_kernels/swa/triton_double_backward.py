"""Attention's double backward in Triton, in two sweeps: `along` first, then `queries` and `keys`.

With the cotangents A, B, C of dQ, dK, dV (None where zero) and the formulas of `reference.double_backward`,
`along` computes dO_bar and the statistics r and E of the rows. Its accumulator is M = (P * (S' - n)) V + P C, so that

    dO_bar = M - (r - n) O        E = rowsum(dO * dO_bar) = rowsum(dO * M) - D (r - n)

where n is 0, or r where S' have more in common than they differ (as where keys have something in common): the
difference of rounded terms would lose that. And T = P * ((S' - r) * (dP - D) + dO C^T - E): neither sweep needs
rowsum(P * S' * dP), since rowsum(P * S' * (dO V^T)) is rowsum(dO * ((P * S') V)).
"""

import triton
import triton.language as tl

from ttt_kernels.swa.triton_backward import weights
from ttt_kernels.swa.triton_tiles import (
    add_product,
    add_product_t,
    head_from,
    head_of,
    head_or_none,
    load_block,
    load_piece,
    load_rows,
    load_statistic,
    load_whole,
    product_t,
    row_or_none,
    row_sum,
    row_sums,
    scaled,
    settle,
    store_piece,
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
)


@triton.jit
def _along_tile(
    b_m, b_r, b_square, b_near, b_q, b_a, b_lse, x_k, x_v, x_b, x_c, i, j, p_first, low, Tq, Tk, window, key_start,
    scale,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, EDGE: tl.constexpr,
    SHIFTED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Adds the keys [j, j + BK) to r - n, to the sum of P * (S' - n)^2 and, where SUM, to M."""
    b_k = load_rows(x_k, j, low, Tk, BK, D, PIECES, EDGE)
    b_i = (i + tl.arange(0, BQ))[:, None]
    b_j = (j + tl.arange(0, BK))[None, :]
    b_p = weights(b_q, b_k, b_lse[:, None], b_i, b_j, p_first, low, Tq, Tk, window, scale, BQ, BK, D, EDGE)
    if b_a is not None or x_b is not None:
        b_s1 = tl.zeros((BQ, BK), tl.float32)
        if b_a is not None:
            b_s1 = add_product_t(b_s1, b_a, b_k, D)
        if x_b is not None:
            b_b = load_rows(x_b, j, tl.maximum(low, key_start), Tk, BK, D, PIECES, EDGE or SHIFTED)
            b_s1 = add_product_t(b_s1, b_q, b_b, D)
        b_s1 = b_s1 * scale - b_near[:, None]
        b_ps1 = b_p * b_s1
        b_r += tl.sum(b_ps1, 1)
        b_square += tl.sum(b_ps1 * b_s1, 1)
        if SUM:
            b_m = add_product(b_m, b_ps1, load_rows(x_v, j, low, Tk, BK, D, PIECES, EDGE), D)
    if SUM and x_c is not None:
        b_c = load_rows(x_c, j, tl.maximum(low, key_start), Tk, BK, D, PIECES, EDGE or SHIFTED)
        b_m = add_product(b_m, b_p, b_c, D)
    return b_m, b_r, b_square


@triton.jit
def _common(b_r, b_square):
    """Whether S' of the rows have more in common, their r, than twice their spread about it."""
    b_shared = b_r * b_r
    return tl.sum(b_shared, 0) > 4 * tl.sum(tl.maximum(b_square - b_shared, 0.0), 0)


@triton.jit(do_not_specialize=["Tq", "Tk", "window", "key_start", "again"])
def along(
    t_q, t_k, t_v, t_o, t_rest, t_do, t_a, t_b, t_c, t_dobar, p_lse, p_r, p_e, p_delta, p_near, p_lengths, p_first,
    scale, Tq, Tk, window, key_start, heads, group, again,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """r; dO_bar (unless t_dobar is None); E and D (unless p_e is None).

    A first launch has n = 0, and leaves r in p_near where n = r would be better, zeros elsewhere. A second launch, with
    `again` above 0, does only those rows once more.

    SHIFTED says whether key_start is above 0: B and C are those of the keys from there on.
    """
    sequence, head, i = query_block(heads, Tq, BQ)
    row = (sequence * heads + head).to(tl.int64) * Tq
    b_near = load_statistic(p_near + row, i, Tq, 0.0, BQ, True)
    if (again > 0) & (tl.max(tl.abs(b_near), 0) == 0):
        return
    b_near = tl.where(again > 0, b_near, 0.0)
    low = lowest_key(p_lengths, sequence, Tk)
    x_k = head_of(t_k, sequence, head // group)
    x_v = head_of(t_v, sequence, head // group)
    x_b = head_from(t_b, sequence, head // group, key_start)
    x_c = head_from(t_c, sequence, head // group, key_start)
    b_q = load_block(head_of(t_q, sequence, head), i, 0, Tq, BQ, D, PIECES)
    b_a = None
    if t_a is not None:
        b_a = load_block(head_of(t_a, sequence, head), i, 0, Tq, BQ, D, PIECES)
    b_lse = load_statistic(p_lse + row, i, Tq, float("inf"), BQ, True)
    span = key_range(i, p_first, low, Tq, Tk, window, BQ, BK)
    SUM: tl.constexpr = t_dobar is not None or p_e is not None
    b_m = zero_rows(BQ, PIECES)
    b_r = tl.zeros((BQ,), tl.float32)
    b_square = tl.zeros((BQ,), tl.float32)
    for EDGE in tl.static_range(2):
        for index in tl.range(tiles(span, BK, EDGE), disable_licm=True):
            b_m, b_r, b_square = _along_tile(
                b_m, b_r, b_square, b_near, b_q, b_a, b_lse, x_k, x_v, x_b, x_c, i,
                tile_start(span, index, BK, EDGE), p_first, low, Tq, Tk, window, key_start, scale,
                BQ, BK, D, PIECES, EDGE, SHIFTED, SUM,
            )  # fmt: skip
    if again == 0:
        store_statistic(p_near + row, tl.where(_common(b_r, b_square), b_r, 0.0), i, Tq, BQ)
    store_statistic(p_r + row, b_r + b_near, i, Tq, BQ)
    # Piece by piece and one result after the other: more at once would overflow the registers.
    x_o = head_of(t_o, sequence, head)
    x_rest = head_or_none(t_rest, sequence, head)
    if t_dobar is not None:
        for piece in tl.static_range(len(PIECES)):
            b_o = load_whole(x_o, x_rest, i, Tq, piece, BQ, D, PIECES)
            b_dobar = b_m[piece] - b_r[:, None] * b_o
            store_piece(head_of(t_dobar, sequence, head), b_dobar, i, Tq, piece, BQ, D, PIECES)
            settle()
    if p_e is not None:
        b_dom = tl.zeros((BQ,), tl.float32)
        for piece in tl.static_range(len(PIECES)):
            b_do = load_piece(head_of(t_do, sequence, head), i, 0, Tq, piece, BQ, D, PIECES, True)
            b_dom += row_sum(b_do, b_m[piece])
            settle()
        x_do = head_of(t_do, sequence, head)
        b_delta = row_sums(x_o, x_rest, x_do, i, Tq, BQ, D, PIECES)
        store_statistic(p_delta + row, b_delta, i, Tq, BQ)
        store_statistic(p_e + row, b_dom - b_delta * b_r, i, Tq, BQ)


@triton.jit
def gradients(b_p, b_s1, b_dp, b_doc, b_delta, b_r, b_e):
    """dS = P * (dP - D) and T = P * ((S' - r) * (dP - D) + dO C^T - E), where S' and dO C^T may be None."""
    b_g = -b_e
    if b_s1 is not None:
        b_g = b_g + (b_s1 - b_r) * (b_dp - b_delta)
    if b_doc is not None:
        b_g = b_g + b_doc
    return b_p * (b_dp - b_delta), b_p * b_g


@triton.jit
def _query_tile(
    b_acc, b_q, b_a, b_do, b_lse, b_delta, b_r, b_e, x_k, x_v, x_b, x_c, i, j, p_first, low, Tq, Tk, window,
    key_start, scale,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, EDGE: tl.constexpr,
    SHIFTED: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Adds dS B + T K of the keys [j, j + BK)."""
    b_k = load_rows(x_k, j, low, Tk, BK, D, PIECES, EDGE)
    b_i = (i + tl.arange(0, BQ))[:, None]
    b_j = (j + tl.arange(0, BK))[None, :]
    b_p = weights(b_q, b_k, b_lse, b_i, b_j, p_first, low, Tq, Tk, window, scale, BQ, BK, D, EDGE)
    b_s1 = None
    b_b = None
    if b_a is not None or x_b is not None:
        b_s1 = tl.zeros((BQ, BK), tl.float32)
        if b_a is not None:
            b_s1 = add_product_t(b_s1, b_a, b_k, D)
        if x_b is not None:
            b_b = load_rows(x_b, j, tl.maximum(low, key_start), Tk, BK, D, PIECES, EDGE or SHIFTED)
            b_s1 = add_product_t(b_s1, b_q, b_b, D)
        b_s1 = b_s1 * scale
    b_dp = product_t(b_do, load_rows(x_v, j, low, Tk, BK, D, PIECES, EDGE), BQ, BK, D)
    b_doc = None
    if x_c is not None:
        b_c = load_rows(x_c, j, tl.maximum(low, key_start), Tk, BK, D, PIECES, EDGE or SHIFTED)
        b_doc = product_t(b_do, b_c, BQ, BK, D)
    b_ds, b_t = gradients(b_p, b_s1, b_dp, b_doc, b_delta, b_r, b_e)
    b_acc = add_product(b_acc, b_t, b_k, D, FIRST)
    if b_b is not None:
        b_acc = add_product(b_acc, b_ds, b_b, D, FIRST)
    return b_acc


@triton.jit(do_not_specialize=["Tq", "Tk", "window", "key_start"])
def queries(
    t_q, t_k, t_v, t_do, t_a, t_b, t_c, t_qbar, p_lse, p_r, p_e, p_delta, p_lengths, p_first,
    scale, Tq, Tk, window, key_start, heads, group,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, SHIFTED: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Q_bar = s (dS B + T K), COUNT pieces of it from piece FIRST on."""
    sequence, head, i = query_block(heads, Tq, BQ)
    row = (sequence * heads + head).to(tl.int64) * Tq
    low = lowest_key(p_lengths, sequence, Tk)
    x_k = head_of(t_k, sequence, head // group)
    x_v = head_of(t_v, sequence, head // group)
    x_b = head_from(t_b, sequence, head // group, key_start)
    x_c = head_from(t_c, sequence, head // group, key_start)
    b_q = load_block(head_of(t_q, sequence, head), i, 0, Tq, BQ, D, PIECES)
    b_do = load_block(head_of(t_do, sequence, head), i, 0, Tq, BQ, D, PIECES)
    b_a = None
    if t_a is not None:
        b_a = load_block(head_of(t_a, sequence, head), i, 0, Tq, BQ, D, PIECES)
    b_lse = load_statistic(p_lse + row, i, Tq, float("inf"), BQ, True)[:, None]
    b_r = load_statistic(p_r + row, i, Tq, 0.0, BQ, True)[:, None]
    b_e = load_statistic(p_e + row, i, Tq, 0.0, BQ, True)[:, None]
    b_delta = load_statistic(p_delta + row, i, Tq, 0.0, BQ, True)[:, None]
    span = key_range(i, p_first, low, Tq, Tk, window, BQ, BK)
    b_acc = zero_rows(BQ, PIECES, FIRST, COUNT)
    for EDGE in tl.static_range(2):
        for index in tl.range(tiles(span, BK, EDGE), disable_licm=True):
            b_acc = _query_tile(
                b_acc, b_q, b_a, b_do, b_lse, b_delta, b_r, b_e, x_k, x_v, x_b, x_c, i,
                tile_start(span, index, BK, EDGE), p_first, low, Tq, Tk, window, key_start, scale,
                BQ, BK, D, PIECES, EDGE, SHIFTED, FIRST,
            )  # fmt: skip
    store_rows(head_of(t_qbar, sequence, head), scaled(b_acc, scale), i, Tq, BQ, D, PIECES, FIRST)


@triton.jit
def _key_tile(
    b_kbar, b_vbar, b_k, b_v, b_b, b_c, x_q, x_do, x_a, p_lse, p_r, p_e, p_delta, i, j, p_first, low,
    Tq, Tk, window, scale,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, EDGE: tl.constexpr,
    KBAR: tl.constexpr, VBAR: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Adds dS^T A + T^T Q and P'^T dO of the queries [i, i + BQ). Tiles stand as (keys, queries)."""
    b_q = load_rows(x_q, i, 0, Tq, BQ, D, PIECES, EDGE)
    b_lse = load_statistic(p_lse, i, Tq, float("inf"), BQ, EDGE)[None, :]
    b_r = load_statistic(p_r, i, Tq, 0.0, BQ, EDGE)[None, :]
    b_i = (i + tl.arange(0, BQ))[None, :]
    b_j = (j + tl.arange(0, BK))[:, None]
    b_p = weights(b_k, b_q, b_lse, b_i, b_j, p_first, low, Tq, Tk, window, scale, BK, BQ, D, EDGE)
    b_s1 = None
    b_a = None
    if x_a is not None or b_b is not None:
        b_s1 = tl.zeros((BK, BQ), tl.float32)
        if x_a is not None:
            b_a = load_rows(x_a, i, 0, Tq, BQ, D, PIECES, EDGE)
            b_s1 = add_product_t(b_s1, b_k, b_a, D)
        if b_b is not None:
            b_s1 = add_product_t(b_s1, b_b, b_q, D)
        b_s1 = b_s1 * scale
    b_do = load_rows(x_do, i, 0, Tq, BQ, D, PIECES, EDGE)
    if VBAR and b_s1 is not None:
        b_vbar = add_product(b_vbar, b_p * (b_s1 - b_r), b_do, D, FIRST)
    if KBAR:
        b_e = load_statistic(p_e, i, Tq, 0.0, BQ, EDGE)[None, :]
        b_delta = load_statistic(p_delta, i, Tq, 0.0, BQ, EDGE)[None, :]
        b_dp = product_t(b_v, b_do, BK, BQ, D)
        b_doc = None
        if b_c is not None:
            b_doc = product_t(b_c, b_do, BK, BQ, D)
        b_ds, b_t = gradients(b_p, b_s1, b_dp, b_doc, b_delta, b_r, b_e)
        b_kbar = add_product(b_kbar, b_t, b_q, D, FIRST)
        if b_a is not None:
            b_kbar = add_product(b_kbar, b_ds, b_a, D, FIRST)
    return b_kbar, b_vbar


@triton.jit(do_not_specialize=["Tq", "Tk", "window", "key_start"])
def keys(
    t_q, t_k, t_v, t_do, t_a, t_b, t_c, t_kbar, t_vbar, p_lse, p_r, p_e, p_delta, p_lengths, p_first, p_end,
    scale, Tq, Tk, window, key_start, heads, group,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """K_bar = s (dS^T A + T^T Q) and V_bar = P'^T dO of all keys (each unless its tensor is None).

    COUNT pieces of them from piece FIRST on.
    """
    sequence, kv_head, j = key_block(heads // group, 0, Tk, BK)
    low = lowest_key(p_lengths, sequence, Tk)
    b_k = load_block(head_of(t_k, sequence, kv_head), j, low, Tk, BK, D, PIECES)
    b_v = load_block(head_of(t_v, sequence, kv_head), j, low, Tk, BK, D, PIECES)
    b_b = None
    if t_b is not None:
        x_b = head_from(t_b, sequence, kv_head, key_start)
        b_b = load_block(x_b, j, tl.maximum(low, key_start), Tk, BK, D, PIECES)
    b_c = None
    if t_c is not None:
        x_c = head_from(t_c, sequence, kv_head, key_start)
        b_c = load_block(x_c, j, tl.maximum(low, key_start), Tk, BK, D, PIECES)
    span = query_range(j, p_end, low, Tq, Tk, window, BQ, BK)
    b_kbar = zero_rows(BK, PIECES, FIRST, COUNT)
    b_vbar = zero_rows(BK, PIECES, FIRST, COUNT)
    for member in range(group):
        head = kv_head * group + member
        row = (sequence * heads + head).to(tl.int64) * Tq
        x_q = head_of(t_q, sequence, head)
        x_do = head_of(t_do, sequence, head)
        x_a = head_or_none(t_a, sequence, head)
        for EDGE in tl.static_range(2):
            for index in tl.range(tiles(span, BQ, EDGE), disable_licm=True):
                b_kbar, b_vbar = _key_tile(
                    b_kbar, b_vbar, b_k, b_v, b_b, b_c, x_q, x_do, x_a, p_lse + row, p_r + row,
                    row_or_none(p_e, row), row_or_none(p_delta, row), tile_start(span, index, BQ, EDGE), j,
                    p_first, low, Tq, Tk, window, scale,
                    BQ, BK, D, PIECES, EDGE, t_kbar is not None, t_vbar is not None, FIRST,
                )  # fmt: skip
    if t_kbar is not None:
        store_rows(head_of(t_kbar, sequence, kv_head), scaled(b_kbar, scale), j, Tk, BK, D, PIECES, FIRST)
    if t_vbar is not None:
        store_rows(head_of(t_vbar, sequence, kv_head), b_vbar, j, Tk, BK, D, PIECES, FIRST)
