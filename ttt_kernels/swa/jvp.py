"""The derivative of attention along tangents, by the formulas of the reference."""

from torch import Tensor

from ttt_kernels.swa.blocks import blocks, layout, valid
from ttt_kernels.swa.reference import scores, scores_tangent, softmax
from ttt_kernels.swa.visible import first_keys
from ttt_kernels.tangents import total


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """O and its derivative along (A, B, C), where None is zero.

    S' = s (A K^T + Q B^T), P' = P * (S' - rowsum(P * S')), and O' = P' V + P C.
    """
    lay = layout(q, k)
    k, v = valid(k, key_lengths), valid(v, key_lengths)
    t_k, t_v = (None if t is None else valid(t, key_lengths) for t in (t_k, t_v))
    outputs, tangents = [], []
    for block in blocks(q, k, first_keys(q, k, key_lengths, cu_seqlens, window), window):
        a = None if t_q is None else lay.queries(t_q, block)
        b, c = (None if t is None else lay.keys(t, block) for t in (t_k, t_v))
        values = lay.keys(v, block)
        p, _ = softmax(scores(lay, q, k, block, scale))
        s1 = scores_tangent(lay, lay.queries(q, block), lay.keys(k, block), a, b, scale)
        p1 = p * (s1 - (p * s1).sum(-1, keepdim=True))
        outputs.append(lay.product(p, values))
        tangents.append(total(lay.product(p1, values), lay.product(p, c)))
    return lay.join_queries(outputs), lay.join_queries(tangents)
