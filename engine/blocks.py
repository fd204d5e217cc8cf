"""One block forward, keeping what its explicit backward needs, and that backward.

x += post_norm(attention(pre_norm(x))), then in suffix blocks x += post_norm'(fast MLP(pre_norm'(x))), then
x += post_norm(MLP(pre_norm(x))). Backward gives gradients of inputs and of fast matrices, of nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from engine.ops import Ops
from engine.weights import BlockWeights, MLPWeights
from ttt_kernels.registry import unrecorded
from ttt_kernels.swiglu.reference import Factors


class Cache(Protocol):
    """Keys and values of earlier tokens."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of new tokens (B, T, H, D); returns all that their queries may see, the new ones last."""


@runtime_checkable
class StaticCache(Cache, Protocol):
    """A cache in memory that is there before its rows are."""

    def rows(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Where keys and values (B, T, H, D) of so many new tokens go; what is there, `extend` need not copy."""


class Projected(NamedTuple):
    """Tokens x (B, T, d) as an attention branch projects them: q, k and v (B, T, H, D), and what leads there."""

    x: Tensor
    rstd: Tensor
    q_raw: Tensor
    q_rstd: Tensor
    k_raw: Tensor
    k_rstd: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor


class AttentionTape(NamedTuple):
    """Intermediates of an attention branch."""

    rows: Projected
    keys: Tensor
    values: Tensor
    saved: Any
    a: Tensor
    post_rstd: Tensor


class MLPTape(NamedTuple):
    """Intermediates of an MLP branch."""

    x: Tensor
    rstd: Tensor
    h: Tensor
    gate: Tensor
    up: Tensor
    y: Tensor
    post_rstd: Tensor


def attention_forward(
    ops: Ops,
    w: BlockWeights,
    x: Tensor,
    positions: Tensor,
    cache: Cache,
    window: int | None,
    *,
    for_backward: bool,
) -> tuple[Tensor, AttentionTape]:
    """x (B, T, d) at `positions` (T,); returns x plus the branch."""
    into = cache.rows(x.shape[1]) if isinstance(cache, StaticCache) else None
    rows = project(ops, w, x, positions, into)
    return attend(ops, w, rows, *cache.extend(rows.k, rows.v), window, for_backward=for_backward)


def project(
    ops: Ops, w: BlockWeights, x: Tensor, positions: Tensor, into: tuple[Tensor, Tensor] | None = None
) -> Projected:
    """The part of an attention branch that is each token's own: x (B, T, d) at `positions` (T,).

    Keys and values may be left in `into`, (B, T, H, D) each.
    """
    heads = (*x.shape[:2], 3, -1, w.q_norm.shape[0])
    h, rstd = ops.norm(x, w.seq_norm)
    q_raw, k_raw, v_raw = ops.linear(h, w.w_qkv).view(heads).unbind(2)
    q, k, v, q_rstd, k_rstd = ops.heads(q_raw, k_raw, v_raw, w.q_norm, w.k_norm, positions, into)
    return Projected(x, rstd, q_raw, q_rstd, k_raw, k_rstd, q, k, v, positions)


def attend(
    ops: Ops,
    w: BlockWeights,
    rows: Projected,
    keys: Tensor,
    values: Tensor,
    window: int | None,
    *,
    for_backward: bool,
) -> tuple[Tensor, AttentionTape]:
    """The rest of it: `keys` and `values` are all that the tokens may see, their own last."""
    o, saved = ops.attention(rows.q, keys, values, window, for_backward=for_backward)
    a = ops.linear(o.flatten(2), w.w_o)
    out, post_rstd = ops.norm(a, w.seq_post_norm, rows.x)
    return out, AttentionTape(rows, keys, values, saved, a, post_rstd)


def attention_backward(
    ops: Ops, w: BlockWeights, tape: AttentionTape, dx: Tensor, window: int | None
) -> Tensor:
    """Gradient of the branch's input; cached keys and values count as constants."""
    da = ops.norm_backward(dx, tape.a, w.seq_post_norm, tape.post_rstd)
    rows = tape.rows
    do = ops.linear_backward(da, w.w_o).view(rows.q.shape)
    dq, dk, dv = ops.attention_backward(do, rows.q, tape.keys, tape.values, tape.saved, window)
    d_heads = ops.heads_backward(
        (dq, dk, dv), rows.q_raw, rows.k_raw, w.q_norm, w.k_norm, rows.q_rstd, rows.k_rstd, rows.positions
    )
    dh = ops.linear_backward(d_heads.flatten(2), w.w_qkv)
    return dx + ops.norm_backward(dh, rows.x, w.seq_norm, rows.rstd)


def mlp_forward(ops: Ops, w: MLPWeights, matrices: Sequence[Tensor], x: Tensor) -> tuple[Tensor, MLPTape]:
    """x (B, T, d); matrices shared or with a leading B; returns x plus the branch."""
    h, rstd = ops.norm(x, w.norm)
    y, gate, up = ops.mlp(h, matrices)
    out, post_rstd = ops.norm(y, w.post_norm, x)
    return out, MLPTape(x, rstd, h, gate, up, y, post_rstd)


def mlp_backward(
    ops: Ops,
    w: MLPWeights,
    matrices: Sequence[Tensor],
    tape: MLPTape,
    dx: Tensor,
    *,
    of_input: bool,
    masters: Sequence[Tensor] | None = None,
    kept: list[Factors] | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of the branch's input, where wanted, and of its matrices, where `masters` are given.

    These have the masters' dtype, to which products are not rounded to the matrices' first unless a graph is recorded.
    `kept` takes their factors; only where none is.
    """
    dy = ops.norm_backward(dx, tape.y, w.post_norm, tape.post_rstd)
    arguments = (dy, tape.h, matrices, tape.gate, tape.up)
    grads: Sequence[Tensor | None]
    if masters is None or not unrecorded((dy, tape.h, *matrices)):
        dh, *grads = ops.mlp_backward(*arguments, of_input=of_input, of_weights=masters is not None)
    else:
        dh, factors = ops.mlp_backward_factored(*arguments, of_input=of_input)
        grads = ops.mlp_gradients(factors, masters)
        if kept is not None:
            kept.append(factors)
    if dh is not None:
        dh = dx + ops.norm_backward(dh, tape.x, w.norm, tape.rstd)
    given = [g for g in grads if g is not None]
    return dh, [g.to(m.dtype) for g, m in zip(given, masters or (), strict=True)]


class SuffixTape(NamedTuple):
    """Intermediates of one suffix block."""

    attention: AttentionTape
    fast: MLPTape
    mlp: MLPTape


def prefix_forward(
    ops: Ops,
    blocks: Sequence[BlockWeights],
    x: Tensor,
    positions: Tensor,
    caches: Sequence[Cache],
    window: int | None,
) -> Tensor:
    """x (B, T, d) through blocks without fast weights."""
    for w, cache in zip(blocks, caches, strict=True):
        x, _ = attention_forward(ops, w, x, positions, cache, window, for_backward=False)
        x, _ = mlp_forward(ops, w.mlp, w.mlp.matrices, x)
    return x


def suffix_forward(
    ops: Ops,
    blocks: Sequence[BlockWeights],
    fast: Sequence[Sequence[Tensor]],
    x: Tensor,
    positions: Tensor,
    caches: Sequence[Cache],
    window: int | None,
) -> tuple[Tensor, list[SuffixTape]]:
    """x (B, T, d) through the blocks with fast weights, (gate, up, down) per block as products read them."""
    tapes = []
    for index, (w, matrices, cache) in enumerate(zip(blocks, fast, caches, strict=True)):
        assert w.fast is not None
        x, attention = attention_forward(ops, w, x, positions, cache, window, for_backward=index > 0)
        x, fast_tape = mlp_forward(ops, w.fast, matrices, x)
        x, mlp = mlp_forward(ops, w.mlp, w.mlp.matrices, x)
        tapes.append(SuffixTape(attention, fast_tape, mlp))
    return x, tapes


def suffix_backward(
    ops: Ops,
    blocks: Sequence[BlockWeights],
    fast: Sequence[Sequence[Tensor]],
    masters: Sequence[Sequence[Tensor]],
    tapes: Sequence[SuffixTape],
    dx: Tensor,
    window: int | None,
    kept: list[Factors] | None = None,
) -> list[Tensor]:
    """Gradients of all fast matrices, block by block (gate, up, down), from that of the suffix's output.

    `fast` is what products read, `masters` what the gradients look like. `kept` takes what they are products of, last
    block first; only where no graph is built.
    """
    grads: list[list[Tensor]] = []
    for index in reversed(range(len(blocks))):
        w, tape = blocks[index], tapes[index]
        assert w.fast is not None
        through, _ = mlp_backward(ops, w.mlp, w.mlp.matrices, tape.mlp, dx, of_input=True)
        assert through is not None
        # Below the first fast MLP there is nothing that the inner loop trains.
        below, block_grads = mlp_backward(
            ops,
            w.fast,
            fast[index],
            tape.fast,
            through,
            of_input=index > 0,
            masters=masters[index],
            kept=kept,
        )
        grads.append(block_grads)
        if below is not None:
            dx = attention_backward(ops, w, tape.attention, below, window)
    return [g for block_grads in reversed(grads) for g in block_grads]
