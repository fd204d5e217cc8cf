"""Attention over a sliding window with tangents, and its gradient, as formulas; see reference.py for the rest."""

from collections.abc import Sequence

from torch import Tensor

from ttt_kernels.swa.blocks import KeySum, blocks, layout, valid
from ttt_kernels.swa.reference import (
    all_keys,
    joined,
    row_products,
    scores,
    scores_tangent,
    softmax,
    weights,
)
from ttt_kernels.swa.visible import first_keys
from ttt_kernels.tangents import total, transposed


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    window: int | None,
    scale: float,
    key_start: int,
) -> tuple[Tensor, ...]:
    """With the tangents A, B, C of Q, K, V, S' = s (A K^T + Q B^T), r = rowsum(P * S'), O' = (P * (S' - r)) V + P C.

    B and C are those of the keys from `key_start` on: (B, Tk - key_start, Hk, D).

    Returns:
        o and its tangent (B, Tq, Hq, D); lse (B, Hq, Tq), o_rest; r, as lse, and tangent_rest, as o_rest.
    """
    lay, k, v = layout(q, k), valid(k, key_lengths), valid(v, key_lengths)
    b, c = (all_keys(t, k, key_lengths) for t in (k_dot, v_dot))
    outputs, tangents, sums, means = [], [], [], []
    for block in blocks(q, k, first_keys(q, k, key_lengths, cu_seqlens, window), window):
        kb, vb = (lay.keys(t, block) for t in (k, v))
        ab = None if q_dot is None else lay.queries(q_dot, block)
        bb, cb = (None if t is None else lay.keys(t, block) for t in (b, c))
        p, lse = softmax(scores(lay, q, k, block, scale))
        s1 = scores_tangent(lay, lay.queries(q, block), kb, ab, bb, scale)
        r = (p * s1).sum(-1, keepdim=True)
        outputs.append(lay.product(p, vb))
        tangents.append(total(lay.product(p * (s1 - r), vb), lay.product(p, cb)))
        sums.append(lse)
        means.append(r)
    (o, o_rest), (tangent, tangent_rest) = (joined(lay, t, True) for t in (outputs, tangents))
    return o, tangent, lay.join_statistic(sums), o_rest, lay.join_statistic(means), tangent_rest


def backward(
    d_o: Tensor,
    d_tangent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    o: Tensor,
    tangent: Tensor,
    lse: Tensor,
    o_rest: Tensor,
    r: Tensor,
    tangent_rest: Tensor,
    window: int | None,
    scale: float,
    key_start: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Cotangents of Q, K, V and of A, B, C, given those of O (X) and of O' (dO).

    dP = dO V^T, D = rowsum(dO * O), dS = P * (dP - D); dQ = s dS K, dK = s dS^T Q, dV = P^T dO are those of A, B, C.

    P' = P * (S' - r)        E = rowsum(dO * O') + rowsum(X * O)
    T = P * ((S' - r) * (dP - D) + dO C^T + X V^T - E)
    Q_bar = s (dS B + T K)        K_bar = s (dS^T A + T^T Q)        V_bar = P'^T dO + P^T X
    """
    lay, k, v = layout(q, k), valid(k, key_lengths), valid(v, key_lengths)
    b, c = (all_keys(t, k, key_lengths) for t in (k_dot, v_dot))
    q_bar, d_q = [], []
    k_bar, v_bar = KeySum(k.shape[1], 0), KeySum(k.shape[1], 0)
    d_k, d_v = KeySum(k.shape[1], key_start), KeySum(k.shape[1], key_start)
    for block in blocks(q, k, first_keys(q, k, key_lengths, cu_seqlens, window), window):
        qb, xb, d_ob = (lay.queries(t, block) for t in (q, d_o, d_tangent))
        kb, vb = (lay.keys(t, block) for t in (k, v))
        ab = None if q_dot is None else lay.queries(q_dot, block)
        bb, cb = (None if t is None else lay.keys(t, block) for t in (b, c))
        p = weights(lay, q, k, lse, block, scale)
        s1 = scores_tangent(lay, qb, kb, ab, bb, scale) - lay.statistic(r, block)
        d = row_products(lay, d_tangent, o, o_rest, block)
        e = row_products(lay, d_tangent, tangent, tangent_rest, block) + row_products(
            lay, d_o, o, o_rest, block
        )
        d_p = lay.product(d_ob, vb.mT) - d
        d_s = p * d_p
        t = p * (total(s1 * d_p, lay.product(d_ob, transposed(cb)), lay.product(xb, vb.mT)) - e)
        if needs[0]:
            q_bar.append(scale * total(lay.product(t, kb), lay.product(d_s, bb)))
        if needs[1]:
            k_bar.add(block, scale * total(lay.product(t.mT, qb), lay.product(d_s.mT, ab)))
        if needs[2]:
            v_bar.add(block, total(lay.product((p * s1).mT, d_ob), lay.product(p.mT, xb)))
        if needs[3]:
            d_q.append(scale * lay.product(d_s, kb))
        if needs[4]:
            d_k.add(block, scale * lay.product(d_s[..., d_k.wanted(block)].mT, qb))
        if needs[5]:
            d_v.add(block, lay.product(p[..., d_v.wanted(block)].mT, d_ob))
    return (
        lay.join_queries(q_bar) if needs[0] else None,
        k_bar.total(k) if needs[1] else None,
        v_bar.total(v) if needs[2] else None,
        lay.join_queries(d_q) if needs[3] else None,
        d_k.total(k) if needs[4] else None,
        d_v.total(v) if needs[5] else None,
    )
