"""Attention over a sliding window on the C++ kernels of csrc/cpu/swa_*.cpp."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttt_kernels.extension import addresses, compute_dtype, dtype_code, kernels
from ttt_kernels.swa import check
from ttt_kernels.swa.rest import empty_rest
from ttt_kernels.swa.visible import first_keys


def _rows(t: Tensor) -> Tensor:
    """(B, T, H, D) with unit stride in D."""
    return t if t.numel() == 0 or t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _located(t: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides of B, T and H; zeros for a tensor that is missing or without elements."""
    if t is None or t.numel() == 0:
        return 0, 0, 0, 0
    b, length, head, _ = t.stride()
    return t.data_ptr(), b, length, head


def _first_keys(
    q: Tensor, k: Tensor, key_lengths: Tensor | None, cu_seqlens: Tensor | None, window: int | None
) -> tuple[Tensor, int]:
    """`visible.first_keys` and its stride of B."""
    first = first_keys(q, k, key_lengths, cu_seqlens, window)
    return first, first.stride(0) if first.shape[0] == q.shape[0] else 0


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
    """As `reference.forward`."""
    # In compiled code nobody has read the numbers yet.
    check.values("sliding_window_attention", k.shape[1], key_lengths, cu_seqlens)
    q, k, v = _rows(q), _rows(k), _rows(v)
    b, tq, heads, d = q.shape
    first, first_b = _first_keys(q, k, key_lengths, cu_seqlens, window)
    o, o_rest = q.new_empty(q.shape), empty_rest(q, keep_rest)
    lse = q.new_empty((b, heads, tq), dtype=compute_dtype(q.dtype))
    if o.numel():
        kernels().swa_forward(
            dtype_code(q.dtype), *_located(q), *_located(k), *_located(v), first.data_ptr(), first_b,
            o.data_ptr(), o_rest.data_ptr(), lse.data_ptr(), b, tq, k.shape[1], heads, k.shape[2], d, scale,
        )  # fmt: skip
    return o, lse, o_rest


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
    """As `reference.backward`."""
    d_o, q, k, v, o, o_rest = (_rows(t) for t in (d_o, q, k, v, o, o_rest))
    lse = lse.contiguous()
    b, tq, heads, d = q.shape
    _, tk, kv_heads, _ = k.shape
    first, first_b = _first_keys(q, k, key_lengths, cu_seqlens, window)
    shape, wide = (b, tk - key_start, kv_heads, d), compute_dtype(q.dtype)
    dq = q.new_empty(q.shape) if needs[0] else None
    dk = k.new_zeros(shape, dtype=wide) if needs[1] else None
    dv = k.new_zeros(shape, dtype=wide) if needs[2] else None
    if q.numel():
        kernels().swa_backward(
            dtype_code(q.dtype), *_located(d_o), *_located(q), *_located(k), *_located(v), first.data_ptr(),
            first_b, *_located(o), *_located(o_rest), lse.data_ptr(),
            *(0 if t is None else t.data_ptr() for t in (dq, dk, dv)), b, tq, tk, heads, kv_heads, d, key_start, scale,
        )  # fmt: skip
    return dq, None if dk is None else dk.to(k.dtype), None if dv is None else dv.to(v.dtype)


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
) -> tuple[Tensor | None, ...]:
    """As `reference.double_backward`."""
    saved = (q, k, v, key_lengths, cu_seqlens, o, lse, o_rest, window, scale, key_start)
    results, _ = second((g_q, g_k, g_v), None, d_o, saved, (*needs, False, False, False))
    return results[:4]


@dataclass(frozen=True)
class Along:
    """The cotangent of d_o, which is the tangent of o; what it lost to rounding; and the rows' sums r (B, H, Tq)."""

    tangent: Tensor
    rest: Tensor
    r: Tensor


def second(
    cotangents: Sequence[Tensor | None],
    d_output: Tensor | None,
    d_o: Tensor,
    saved: Sequence[Any],
    needs: Sequence[bool],
    known: Along | None = None,
    *,
    keep: bool = False,
) -> tuple[tuple[Tensor | None, ...], Along | None]:
    """Cotangents of d_o, q, k and v, those of a cotangent of o included, and the gradients of q, k and v for d_o.

    Args:
        saved: q, k, v, key_lengths, cu_seqlens, o, lse, o_rest, window, scale and key_start.
        known: what another call with the same cotangents gave to be kept; no cotangent of d_o is needed then.
        keep: whether it is wanted, with the cotangent of d_o.
    """
    *_, key_lengths, cu_seqlens, o, lse, o_rest, window, scale, key_start = saved
    given = [None if g is None else _rows(g) for g in (*cotangents, d_output)]
    d_o, q, k, v, o, o_rest = (_rows(t) for t in (d_o, *saved[:3], o, o_rest))
    lse = lse.contiguous()
    b, tq, heads, d = q.shape
    _, tk, kv_heads, _ = k.shape
    first, first_b = _first_keys(q, k, key_lengths, cu_seqlens, window)
    own, wide = (b, tk - key_start, kv_heads, d), compute_dtype(q.dtype)
    of_queries, of_keys = (q.shape, None), (k.shape, wide)
    kinds = (of_queries, of_queries, of_keys, of_keys, of_queries, (own, wide), (own, wide))
    results = [_memory(q, *kind) if need else None for kind, need in zip(kinds, needs, strict=True)]
    do_bar, *others = results
    do_rest = empty_rest(q, True) if keep else None
    r = torch.empty_like(lse) if keep else None if known is None else known.r.contiguous()
    tangent, tangent_rest = (None, None) if known is None else (_rows(known.tangent), _rows(known.rest))
    if q.numel():
        kernels().swa_double_backward(
            dtype_code(q.dtype), *(n for g in given for n in _located(g)),
            *_located(d_o), *_located(q), *_located(k), *_located(v), first.data_ptr(), first_b, *_located(o),
            *_located(o_rest), *_located(tangent), *_located(tangent_rest), lse.data_ptr(),
            *addresses(r, do_bar, do_rest, *others), b, tq, tk, heads, kv_heads, d, key_start, scale,
        )  # fmt: skip
    kept = None if do_bar is None or do_rest is None or r is None else Along(do_bar, do_rest, r)
    return tuple(None if t is None else t.to(q.dtype) for t in results), kept


def _memory(like: Tensor, shape: Sequence[int], sums: torch.dtype | None) -> Tensor:
    """A result of like's dtype, or zeros to add to in the dtype of sums."""
    return like.new_empty(shape) if sums is None else like.new_zeros(shape, dtype=sums)
