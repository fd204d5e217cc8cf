"""Attention over a sliding window, its gradient and its gradient's gradient, as formulas.

With scale s, over the keys that each query sees:

    S = s Q K^T        P = softmax(S)        O = P V        lse = log of the sum of e^S

Everything is done in blocks of queries (blocks.py), a head's queries, keys and values being the matrices Q, K
and V of the formulas. A query without keys has a row of zeros in P.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels.swa.blocks import Block, KeySum, Layout, blocks, layout, valid
from ttt_kernels.swa.visible import first_keys
from ttt_kernels.tangents import total, transposed


def scores(layout: Layout, q: Tensor, k: Tensor, block: Block, scale: float) -> Tensor:
    """S of a block, -inf where a query does not see a key."""
    s = scale * layout.product(layout.queries(q, block), layout.keys(k, block).mT)
    return s.masked_fill(block.hidden, float("-inf"))


def softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """P and lse (-inf for a row without keys), finite in every derivative."""
    top = s.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    none = total == 0
    total = total.masked_fill(none, 1)
    return e / total, (top + total.log()).masked_fill(none, float("-inf"))


def scores_tangent(
    layout: Layout, q: Tensor, k: Tensor, t_q: Tensor | None, t_k: Tensor | None, scale: float
) -> Tensor:
    """s (A K^T + Q B^T) of a block, for tangents A of Q and B of K (None: zero)."""
    s = total(layout.product(t_q, k.mT), layout.product(q, transposed(t_k)))
    return (
        torch.zeros((*q.shape[:-1], k.shape[-2]), dtype=layout.wide, device=q.device)
        if s is None
        else scale * s
    )


def weights(layout: Layout, q: Tensor, k: Tensor, lse: Tensor, block: Block, scale: float) -> Tensor:
    """P of a block from the saved lse."""
    rows = layout.statistic(lse, block)
    return torch.exp(scores(layout, q, k, block, scale) - rows.masked_fill(rows == float("-inf"), 0))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
    key_start: int = 0,
    keep_rest: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns o (B, Tq, Hq, D), lse (B, Hq, Tq), float32 or float64, and o_rest; `key_start` matters to `backward`."""
    lay, k, v = layout(q, k), valid(k, key_lengths), valid(v, key_lengths)
    outputs, statistics = [], []
    for block in blocks(q, k, first_keys(q, k, key_lengths, cu_seqlens, window), window):
        p, lse = softmax(scores(lay, q, k, block, scale))
        outputs.append(lay.product(p, lay.keys(v, block)))
        statistics.append(lse)
    o, o_rest = joined(lay, outputs, keep_rest)
    return o, lay.join_statistic(statistics), o_rest


def joined(layout: Layout, outputs: Sequence[Tensor], keep_rest: bool) -> tuple[Tensor, Tensor]:
    """o, and what it lost to rounding where that is kept."""
    o = layout.join_queries(outputs)
    if not keep_rest or layout.wide == layout.dtype:
        return o, o.new_empty(0)
    return o, layout.join_queries([t - t.to(layout.dtype) for t in outputs])


def row_products(layout: Layout, d_o: Tensor, o: Tensor, o_rest: Tensor, block: Block) -> Tensor:
    """D of a block, rowsum(dO * O)."""
    d_o, o = (layout.widen(layout.queries(t, block)) for t in (d_o, o))
    if o_rest.numel():
        o = o + layout.queries(o_rest, block)
    return (d_o * o).sum(-1, keepdim=True)


def backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
    o_rest: Tensor,
    window: int | None,
    scale: float,
    key_start: int,
    keep_rest: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dV = P^T dO, dP = dO V^T, D = rowsum(dO * O), dS = P * (dP - D), dQ = s dS K, dK = s dS^T Q.

    dK and dV are those of the keys from `key_start` on: (B, Tk - key_start, Hk, D).
    """
    lay, k, v = layout(q, k), valid(k, key_lengths), valid(v, key_lengths)
    d_q, d_k, d_v = [], KeySum(k.shape[1], key_start), KeySum(k.shape[1], key_start)
    for block in blocks(q, k, first_keys(q, k, key_lengths, cu_seqlens, window), window):
        qb, d_ob = (lay.queries(t, block) for t in (q, d_o))
        kb, vb = lay.keys(k, block), lay.keys(v, block)
        p = weights(lay, q, k, lse, block, scale)
        if needs[2]:
            d_v.add(block, lay.product(p[..., d_v.wanted(block)].mT, d_ob))
        if needs[0] or needs[1]:
            d = row_products(lay, d_o, o, o_rest, block)
            d_s = p * (lay.product(d_ob, vb.mT) - d)
            if needs[0]:
                d_q.append(scale * lay.product(d_s, kb))
            if needs[1]:
                d_k.add(block, scale * lay.product(d_s[..., d_k.wanted(block)].mT, qb))
    return (
        lay.join_queries(d_q) if needs[0] else None,
        d_k.total(k) if needs[1] else None,
        d_v.total(v) if needs[2] else None,
    )


def double_backward(
    g_q: Tensor | None,
    g_k: Tensor | None,
    g_v: Tensor | None,
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
    o_rest: Tensor,
    window: int | None,
    scale: float,
    key_start: int,
    keep_rest: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Cotangents of dO, Q, K and V, given those of dQ (A), dK (B) and dV (C).

    S' = s (A K^T + Q B^T)        r = rowsum(P * S')         P' = P * (S' - r)
    dO_bar = P' V + P C
    G = S' * (dP - D) - r dP + dO C^T        E = rowsum(P * G)        T = P * (G - E)
    Q_bar = s (dS B + T K)        K_bar = s (dS^T A + T^T Q)          V_bar = P'^T dO
    """
    lay, k, v = layout(q, k), valid(k, key_lengths), valid(v, key_lengths)
    b, c = (all_keys(g, k, key_lengths) for g in (g_k, g_v))
    do_bar, q_bar = [], []
    k_bar, v_bar = KeySum(k.shape[1], 0), KeySum(k.shape[1], 0)
    for block in blocks(q, k, first_keys(q, k, key_lengths, cu_seqlens, window), window):
        qb, d_ob = (lay.queries(t, block) for t in (q, d_o))
        kb, vb = (lay.keys(t, block) for t in (k, v))
        ab = None if g_q is None else lay.queries(g_q, block)
        bb, cb = (None if g is None else lay.keys(g, block) for g in (b, c))
        p = weights(lay, q, k, lse, block, scale)
        s1 = scores_tangent(lay, qb, kb, ab, bb, scale)
        r = (p * s1).sum(-1, keepdim=True)
        p1 = p * (s1 - r)
        if needs[0]:
            do_bar.append(total(lay.product(p1, vb), lay.product(p, cb)))
        if needs[3]:
            v_bar.add(block, lay.product(p1.mT, d_ob))
        if needs[1] or needs[2]:
            d = row_products(lay, d_o, o, o_rest, block)
            d_p = lay.product(d_ob, vb.mT)
            d_s = p * (d_p - d)
            g = total(s1 * (d_p - d) - r * d_p, lay.product(d_ob, transposed(cb)))
            t = p * (g - (p * g).sum(-1, keepdim=True))
            if needs[1]:
                q_bar.append(scale * total(lay.product(t, kb), lay.product(d_s, bb)))
            if needs[2]:
                k_bar.add(block, scale * total(lay.product(t.mT, qb), lay.product(d_s.mT, ab)))
    return (
        lay.join_queries(do_bar) if needs[0] else None,
        lay.join_queries(q_bar) if needs[1] else None,
        k_bar.total(k) if needs[2] else None,
        v_bar.total(v) if needs[3] else None,
    )


def all_keys(g: Tensor | None, k: Tensor, key_lengths: Tensor | None) -> Tensor | None:
    """The cotangent of dK or dV with zeros for the keys before `key_start`, which have no gradient."""
    if g is None:
        return None
    return valid(torch.nn.functional.pad(g, (0, 0, 0, 0, k.shape[1] - g.shape[1], 0)), key_lengths)
