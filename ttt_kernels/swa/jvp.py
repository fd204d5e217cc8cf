"""Attention and its derivative along tangents (A, B, C) of q, k and v; it differentiates once in reverse.

S' = s (A K^T + Q B^T), P' = P * (S' - rowsum(P * S')), and the tangent is O' = P' V + P C: what the double backward
of attention computes as the cotangent of dO. So with J the derivative of attention, O' = J (A, B, C), its gradient
with respect to (A, B, C) for a cotangent d is the backward pass, J^T d, and with respect to (Q, K, V) it is the
double backward, the gradient of <J^T d, (A, B, C)>.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ttt_kernels.backends import refuse_on_cpu
from ttt_kernels.extension import compute_dtype
from ttt_kernels.registry import Kernel, Operator
from ttt_kernels.swa import cpu, reference, triton
from ttt_kernels.swa.blocks import blocks, layout, valid
from ttt_kernels.swa.reference import joined, scores, scores_tangent, softmax
from ttt_kernels.swa.rest import empty_rest
from ttt_kernels.swa.visible import first_keys
from ttt_kernels.tangents import total

Gradients = tuple[Tensor | None, ...]


def reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """o, its tangent, both (B, Tq, Hq, D), lse (B, Hq, Tq) and o_rest; a tangent that is None is zero."""
    lay = layout(q, k)
    k, v = valid(k, key_lengths), valid(v, key_lengths)
    k_dot, v_dot = (None if t is None else valid(t, key_lengths) for t in (k_dot, v_dot))
    outputs, tangents, statistics = [], [], []
    for block in blocks(q, k, first_keys(q, k, key_lengths, cu_seqlens, window), window):
        a = None if q_dot is None else lay.queries(q_dot, block)
        b, c = (None if t is None else lay.keys(t, block) for t in (k_dot, v_dot))
        values = lay.keys(v, block)
        p, lse = softmax(scores(lay, q, k, block, scale))
        s1 = scores_tangent(lay, lay.queries(q, block), lay.keys(k, block), a, b, scale)
        p1 = p * (s1 - (p * s1).sum(-1, keepdim=True))
        outputs.append(lay.product(p, values))
        tangents.append(total(lay.product(p1, values), lay.product(p, c)))
        statistics.append(lse)
    o, o_rest = joined(lay, outputs, keep_rest=True)
    return o, lay.join_queries(tangents), lay.join_statistic(statistics), o_rest


def _forward(kernels: Any) -> Kernel:
    """`reference_forward` by the forward and the first sweep of the double backward of attention."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_dot: Tensor | None,
        k_dot: Tensor | None,
        v_dot: Tensor | None,
        key_lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, ...]:
        call = (q, k, v, key_lengths, cu_seqlens)
        o, *saved = kernels.forward(*call, window, scale, keep_rest=True)
        # The tangent does not depend on a cotangent of the output: any tensor like it will do.
        needs = (True, False, False, False)
        given = (q_dot, k_dot, v_dot, o, *call, o, *saved)
        tangent, *_ = kernels.double_backward(*given, window, scale, 0, True, needs)
        return o, tangent, *saved

    return forward


def _backward(kernels: Any) -> Kernel:
    """The gradients of the six tensors, by the backward and double backward of attention."""

    def backward(
        d_o: Tensor,
        d_tangent: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_dot: Tensor | None,
        k_dot: Tensor | None,
        v_dot: Tensor | None,
        key_lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        o: Tensor,
        lse: Tensor,
        o_rest: Tensor,
        window: int | None,
        scale: float,
        needs: Sequence[bool],
    ) -> Gradients:
        call = (q, k, v, key_lengths, cu_seqlens, o, lse, o_rest, window, scale, 0, True)
        to_inputs: Gradients = (None,) * 3
        to_dots: Gradients = (None,) * 3
        if any(needs[:3]):
            direct = kernels.backward(d_o, *call, needs=needs[:3])
            dots = (q_dot, k_dot, v_dot)
            through = kernels.double_backward(*dots, d_tangent, *call, needs=(False, *needs[:3]))[1:]
            to_inputs = tuple(total(a, b) for a, b in zip(direct, through, strict=True))
        if any(needs[3:]):
            to_dots = kernels.backward(d_tangent, *call, needs=needs[3:])
        return (*to_inputs, *to_dots)

    return backward


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, ...]:
    b, tq, heads, _d = q.shape
    statistics = q.new_empty((b, heads, tq), dtype=compute_dtype(q.dtype))
    return q.new_empty(q.shape), q.new_empty(q.shape), statistics, empty_rest(q, True)


operator = Operator(
    name="swa_jvp",
    inputs={
        **dict.fromkeys(("q", "k", "v"), "Tensor"),
        **dict.fromkeys(("q_dot", "k_dot", "v_dot", "key_lengths", "cu_seqlens"), "Tensor?"),
    },
    params={"window": "int?", "scale": "float"},
    outputs={"o": "Tensor", "tangent": "Tensor"},
    saved={"lse": "Tensor", "o_rest": "Tensor"},
    differentiable=("q", "k", "v", "q_dot", "k_dot", "v_dot"),
    fake=_fake,
    kernels={
        "reference": {"forward": reference_forward, "backward": _backward(reference)},
        **{
            name: {"forward": _forward(kernels), "backward": _backward(kernels)}
            for name, kernels in (("cpu", cpu), ("triton", triton))
        },
    },
    refusals={"cpu": refuse_on_cpu, "triton": triton.refuse},
    keeps=("o",),
)
