"""A mini-batch read with tangents of the fast weights: its losses, and what they change by along a direction.

What the sweep back needs of an inner gradient g is the gradient of <v, g>, v being g's cotangent. That inner product
is the derivative of the inner loss along v, which one pass forward gives beside the losses themselves: differentiated
in reverse (reverse over forward, "mixed mode") it gives all that taking g's own computation back would
(docstring of ttt_kernels/jvp.py), and g does not have to be computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.blocks import Cache, attention_forward
from engine.config import TTTConfig
from engine.inner import FastWeights, shares
from engine.ops import Ops
from engine.weights import BlockWeights, Fast, MLPWeights, SuffixWeights


def loss_along(
    ops: Ops,
    config: TTTConfig,
    weights: SuffixWeights,
    fast: FastWeights,
    dots: Fast,
    x: Tensor,
    positions: Tensor,
    targets: Tensor,
    caches: Sequence[Cache],
    known: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """nll (B, b) of a mini-batch, and the derivative (B,) of every sequence's inner loss along `dots`.

    Arguments are those of `inner_forward`; `dots` are tangents of `fast`, in the dtype of its copies. Differentiable
    once with respect to everything where a graph is recorded.
    """
    x_dot: Tensor | None = None
    for w, matrices, block_dots, cache in zip(weights.suffix, fast.copies, dots, caches, strict=True):
        assert w.fast is not None
        if x_dot is None:
            x, _ = attention_forward(ops, w, x, positions, cache, config.window, for_backward=False)
        else:
            x, x_dot = _attention(ops, w, x, x_dot, positions, cache, config.window)
        x, x_dot = _mlp(ops, w.fast, matrices, x, x_dot, block_dots)
        x, x_dot = _mlp(ops, w.mlp, w.mlp.matrices, x, x_dot)
    assert x_dot is not None
    hidden, hidden_dot = ops.norm_jvp(x, weights.final_norm, None, x_dot)
    nll, slope, _ = ops.nll_and_slope(hidden, weights.head, targets, known)
    nll_dot = (slope * hidden_dot).sum(-1)
    return nll, (nll_dot * shares(targets, config, nll_dot.dtype)).sum(-1)


def _attention(
    ops: Ops,
    w: BlockWeights,
    x: Tensor,
    x_dot: Tensor,
    positions: Tensor,
    cache: Cache,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """`blocks.attention_forward` with a tangent; cached keys and values have none."""
    heads = (*x.shape[:2], 3, -1, w.q_norm.shape[0])
    h, h_dot = ops.norm_jvp(x, w.seq_norm, None, x_dot)
    q, k, v = ops.linear(h, w.w_qkv).view(heads).unbind(2)
    q_dot, k_dot, v_dot = ops.linear(h_dot, w.w_qkv).view(heads).unbind(2)
    q, q_dot = ops.norm_jvp(q, w.q_norm, None, q_dot)
    k, k_dot = ops.norm_jvp(k, w.k_norm, None, k_dot)
    keys, values = cache.extend(ops.rope(k, positions), v)
    # Rotations are linear: tangents turn as what they belong to.
    dots = (ops.rope(q_dot, positions), ops.rope(k_dot, positions), v_dot)
    o, o_dot = ops.attention_jvp((ops.rope(q, positions), keys, values), dots, window)
    a, a_dot = (ops.linear(t.flatten(2), w.w_o) for t in (o, o_dot))
    return ops.norm_jvp(a, w.seq_post_norm, x, a_dot, x_dot)


def _mlp(
    ops: Ops,
    w: MLPWeights,
    matrices: Sequence[Tensor],
    x: Tensor,
    x_dot: Tensor | None,
    dots: Sequence[Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor]:
    """`blocks.mlp_forward` with tangents of x and of the matrices."""
    if x_dot is None:
        h, h_dot = ops.norm(x, w.norm)[0], None
    else:
        h, h_dot = ops.norm_jvp(x, w.norm, None, x_dot)
    y, y_dot = ops.mlp_jvp(h, matrices, h_dot, dots)
    return ops.norm_jvp(y, w.post_norm, x, y_dot, x_dot)
