"""Attention's forward in Triton: a program per block of queries and head, softmax online over the keys."""

import triton
import triton.language as tl

from ttt_kernels.swa.triton_tiles import (
    LOG2E,
    add_product,
    head_of,
    in_memory,
    load_block,
    load_rows,
    product_t,
    rest,
    scaled,
    store_piece,
    store_rows,
    store_statistic,
    zero_rows,
)
from ttt_kernels.swa.triton_visible import key_range, lowest_key, query_block, tile_start, tiles, where_seen

_NONE = tl.constexpr(float("-inf"))


@triton.jit
def _unit(b_q):
    """Scores are kept as powers of 2, but those of float32, whose rounding to another unit would show, of e."""
    return 1.0 if in_memory(b_q[0].dtype) else LOG2E


@triton.jit
def _exponential(b_x, b_q):
    """Weights from differences of scores."""
    return tl.exp2(b_x * LOG2E) if in_memory(b_q[0].dtype) else tl.exp2(b_x)


@triton.jit
def softmax_tile(
    b_max, b_sum, b_q, b_k, i, j, p_first, low, Tq, Tk, window, scale,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Weights (BQ, BK) of the keys [j, j + BK), the factor by which earlier ones decay, and the new b_max and b_sum.

    Weights and b_sum are relative to the weight of b_max.
    """
    b_s = product_t(b_q, b_k, BQ, BK, D)
    if EDGE:
        b_i = (i + tl.arange(0, BQ))[:, None]
        b_j = (j + tl.arange(0, BK))[None, :]
        b_s = where_seen(b_s, True, b_i, b_j, p_first, low, Tq, Tk, window)
    b_top = tl.maximum(b_max, tl.max(b_s, 1) * (scale * _unit(b_q)))
    b_zero = b_top
    if EDGE:
        # A row that has seen no key yet has nothing to be relative to.
        b_zero = tl.where(b_top == _NONE, 0.0, b_top)
    b_p = _exponential(b_s * (scale * _unit(b_q)) - b_zero[:, None], b_q)
    b_decay = _exponential(b_max - b_zero, b_q)
    return b_p, b_decay, b_top, b_sum * b_decay + tl.sum(b_p, 1)


@triton.jit
def ended(b_max, b_sum, b_q):
    """What makes weights of a sum of them, and lse, of rows that have seen all their keys."""
    m_none = b_sum == 0
    b_sum = tl.where(m_none, 1.0, b_sum)
    return 1 / b_sum, tl.where(m_none, _NONE, b_max / _unit(b_q) + tl.log(b_sum))


@triton.jit
def _tile(
    b_acc, b_max, b_sum, b_q, x_k, x_v, i, j, p_first, low, Tq, Tk, window, scale,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds the keys [j, j + BK)."""
    b_k = load_rows(x_k, j, low, Tk, BK, D, PIECES, EDGE)
    b_p, b_decay, b_max, b_sum = softmax_tile(
        b_max, b_sum, b_q, b_k, i, j, p_first, low, Tq, Tk, window, scale, BQ, BK, D, EDGE
    )
    b_v = load_rows(x_v, j, low, Tk, BK, D, PIECES, EDGE)
    return add_product(scaled(b_acc, b_decay[:, None]), b_p, b_v, D), b_max, b_sum


@triton.jit(do_not_specialize=["Tq", "Tk", "window"])
def attention(
    t_q, t_k, t_v, t_o, t_rest, p_lse, p_lengths, p_first, scale, Tq, Tk, window, heads, group,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """O, what it loses to rounding (unless t_rest is None) and lse; `scale` is positive."""
    sequence, head, i = query_block(heads, Tq, BQ)
    low = lowest_key(p_lengths, sequence, Tk)
    x_k = head_of(t_k, sequence, head // group)
    x_v = head_of(t_v, sequence, head // group)
    b_q = load_block(head_of(t_q, sequence, head), i, 0, Tq, BQ, D, PIECES)
    span = key_range(i, p_first, low, Tq, Tk, window, BQ, BK)
    b_acc = zero_rows(BQ, PIECES)
    b_max = tl.full((BQ,), _NONE, tl.float32)
    b_sum = tl.zeros((BQ,), tl.float32)
    for EDGE in tl.static_range(2):
        for index in tl.range(tiles(span, BK, EDGE), disable_licm=True):
            b_acc, b_max, b_sum = _tile(
                b_acc, b_max, b_sum, b_q, x_k, x_v, i, tile_start(span, index, BK, EDGE), p_first, low,
                Tq, Tk, window, scale, BQ, BK, D, PIECES, EDGE,
            )  # fmt: skip
    b_share, b_lse = ended(b_max, b_sum, b_q)
    b_acc = scaled(b_acc, b_share[:, None])
    store_rows(head_of(t_o, sequence, head), b_acc, i, Tq, BQ, D, PIECES)
    if t_rest is not None:
        x_rest = head_of(t_rest, sequence, head)
        for piece in tl.static_range(len(PIECES)):
            store_piece(x_rest, rest(b_acc[piece], t_o[0].dtype.element_ty), i, Tq, piece, BQ, D, PIECES)
    p_row = p_lse + (sequence * heads + head).to(tl.int64) * Tq
    store_statistic(p_row, b_lse, i, Tq, BQ)
