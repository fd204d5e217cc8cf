"""Which keys a query sees: a range that ends at its own position."""

import torch
from torch import Tensor


def first_keys(
    q: Tensor, k: Tensor, key_lengths: Tensor | None, cu_seqlens: Tensor | None, window: int | None
) -> Tensor:
    """The first key that each query sees; it sees all from there to its own position Tk - Tq + i.

    Args:
        q, k: (B, Tq, Hq, D), (B, Tk, Hk, D).
        key_lengths: (B,) integers, or None: how many trailing keys of each sequence are valid.
        cu_seqlens: (n + 1,) integers, or None: boundaries of sequences packed in a batch of 1.
        window: keys that a query sees at most, itself included; None for no limit.

    Returns:
        (B or 1, Tq) int64, not falling along a row. Where it is beyond the query's position there is no key.
    """
    tq, tk = q.shape[1], k.shape[1]
    position = torch.arange(tk - tq, tk, device=q.device)
    first = torch.zeros_like(position) if window is None else (position - (window - 1)).clamp_min(0)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(torch.int64)
        sequence = torch.searchsorted(bounds, position, right=True) - 1
        first = torch.maximum(first, bounds[sequence])
    first = first[None]
    if key_lengths is not None:
        first = torch.maximum(first, tk - key_lengths.to(torch.int64)[:, None])
    return first
