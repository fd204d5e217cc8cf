"""Attention over a sliding window as plain PyTorch has it, written from the contract alone."""

import torch
from torch import Tensor


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attention with its whole matrix of scores, in the inputs' dtype, for automatic differentiation."""
    tq, tk, shared = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    query, key = (torch.arange(n, tk, device=q.device) for n in (tk - tq, 0))
    seen = (key <= query[:, None]) & (key > query[:, None] - (window or tk))
    if cu_seqlens is not None:
        sequence = (key[:, None] >= cu_seqlens).sum(1)
        seen = seen & (sequence[tk - tq :, None] == sequence)
    seen = seen.expand(q.shape[0], tq, tk)
    if key_lengths is not None:
        seen = seen & (key >= tk - key_lengths[:, None, None])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(shared, 2)) * scale
    hidden = ~seen[:, None]
    # Without infinities, a query without keys has no NaN in its gradients.
    weights = torch.softmax(scores.masked_fill(hidden, torch.finfo(q.dtype).min), -1).masked_fill(hidden, 0)
    return torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(shared, 2))
