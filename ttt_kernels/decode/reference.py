"""One token through the whole stack by plain torch calls, on any device, in any floating dtype."""

import torch
from torch import Tensor

from ttt_kernels.decode.layers import LayerWeights, Stack
from ttt_kernels.matmul import mm
from ttt_kernels.rms_norm import reference as rms_norm


def step(stack: Stack, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `ttt_kernels.decode.step`; waits for `visible` where that is on a GPU."""
    prefix_output = x
    for index, (layer, (row, count)) in enumerate(zip(stack.layers, visible.tolist(), strict=True)):
        attended = _attention(stack, layer, _norm(x, layer.seq_norm, stack), cos, sin, row, count)
        x = x + _norm(attended, layer.seq_post_norm, stack)
        if layer.has_fast:
            fast = _swiglu(_norm(x, layer.fast_norm, stack), layer.fast_gate, layer.fast_up, layer.fast_down)
            x = x + _norm(fast, layer.fast_post_norm, stack)
        static = _swiglu(_norm(x, layer.mlp_norm, stack), layer.w_gate, layer.w_up, layer.w_down)
        x = x + _norm(static, layer.mlp_post_norm, stack)
        if index + 1 == stack.n_prefix:
            prefix_output = x
    hidden = _norm(x, stack.final_norm, stack)
    wide = torch.promote_types(x.dtype, torch.float32)
    return prefix_output, hidden, mm(hidden, stack.head.T, wide)


def _attention(
    stack: Stack, layer: LayerWeights, h: Tensor, cos: Tensor, sin: Tensor, row: int, count: int
) -> Tensor:
    """W_o softmax(q K^T / sqrt(D)) V for one query per head; writes the token's key and value."""
    q, k, v = mm(h, layer.w_qkv.T).view(-1, 3, stack.n_heads, stack.head_dim).unbind(1)
    q = _rotate(_norm(q, layer.q_norm, stack), cos, sin)
    layer.k_cache[:, row] = _rotate(_norm(k, layer.k_norm, stack), cos, sin)
    layer.v_cache[:, row] = v
    wide = torch.promote_types(h.dtype, torch.float32)
    keys, values = (cache[:, row + 1 - count : row + 1].to(wide) for cache in (layer.k_cache, layer.v_cache))
    scores = torch.einsum("bhd,bnhd->bhn", q.to(wide), keys) * stack.head_dim**-0.5
    out = torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), values)
    return mm(out.to(h.dtype).flatten(1), layer.w_o.T)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (2j, 2j+1) of x (B, H, D) by the angles of cos, sin (B, D/2)."""
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None], sin[:, None]
    return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2).to(x.dtype)


def _swiglu(x: Tensor, gate: Tensor | None, up: Tensor | None, down: Tensor | None) -> Tensor:
    """(silu(x gate^T) * x up^T) down^T for x (B, d), with matrices for all sequences or one for each."""
    assert gate is not None
    assert up is not None
    assert down is not None
    rows = x[:, None] if gate.dim() == 3 else x
    wide = torch.promote_types(x.dtype, torch.float32)
    g, u = mm(rows, gate.mT).to(wide), mm(rows, up.mT).to(wide)
    return mm((torch.nn.functional.silu(g) * u).to(x.dtype), down.mT).view(x.shape)


def _norm(x: Tensor, weight: Tensor | None, stack: Stack) -> Tensor:
    assert weight is not None
    return rms_norm.forward(x, weight, None, stack.eps)[0]
