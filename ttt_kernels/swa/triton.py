"""Attention over a sliding window on the Triton kernels of triton_*.py, which a first call imports."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_kernels.backends import refuse_on_triton
from ttt_kernels.swa.rest import empty_rest
from ttt_kernels.swa.triton_configs import HEAD_DIM, parts, sums_both


def refuse(tensors: tuple[Tensor, ...]) -> str | None:
    """What the kernels cannot take besides what no Triton kernel can: large heads."""
    head_dim = tensors[0].shape[3]
    if head_dim > HEAD_DIM:
        return f"head_dim is {head_dim}; accepted are up to {HEAD_DIM}"
    return refuse_on_triton(tensors)


def _launches(of_keys: Any, of_values: Any, q: Tensor) -> list[tuple[Any, Any]]:
    """Which results a launch sums: of keys and values together, unless registers do not hold both."""
    if sums_both(q.shape[3], q.dtype):
        return [(of_keys, of_values)] if of_keys or of_values else []
    return [pair for pair in ((of_keys, None), (None, of_values)) if any(pair)]


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
    from ttt_kernels.swa import triton_forward
    from ttt_kernels.swa.triton_launch import Call, located, located_or_none

    o, o_rest = q.new_empty(q.shape), empty_rest(q, keep_rest)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    if o.numel() == 0:
        return o, lse, o_rest
    if scale <= 0:
        # The kernel takes the largest product for the largest score.
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    Call(q, k, key_lengths, cu_seqlens, window, scale).by_queries(
        "forward", triton_forward.attention,
        t_q=located(q), t_k=located(k), t_v=located(v), t_o=located(o),
        t_rest=located_or_none(o_rest), p_lse=lse,
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
    from ttt_kernels.swa import triton_backward
    from ttt_kernels.swa.triton_launch import Call, located, located_or_none

    b, tk, kv_heads, d = k.shape
    shape = (b, tk - key_start, kv_heads, d)
    if q.numel() == 0:
        return (
            q.new_empty(q.shape) if needs[0] else None,
            k.new_zeros(shape) if needs[1] else None,
            v.new_zeros(shape) if needs[2] else None,
        )
    dq = q.new_empty(q.shape) if needs[0] else None
    dk = k.new_empty(shape) if needs[1] else None
    dv = v.new_empty(shape) if needs[2] else None
    lse = lse.contiguous()
    delta = torch.empty_like(lse) if needs[1] else None
    call = Call(q, k, key_lengths, cu_seqlens, window, scale)
    x_q, x_k, x_v, x_do = (located(t) for t in (q, k, v, d_o))
    if needs[0] or needs[1]:
        call.by_queries(
            "backward_queries", triton_backward.queries,
            t_q=x_q, t_k=x_k, t_v=x_v, t_o=located(o), t_rest=located_or_none(o_rest), t_do=x_do,
            t_dq=located_or_none(dq), p_lse=lse, p_delta=delta,
        )  # fmt: skip
    if tk > key_start:
        for t_dk, t_dv in _launches(located_or_none(dk), located_or_none(dv), q):
            call.by_keys(
                "backward_keys", triton_backward.keys, tk - key_start,
                t_q=x_q, t_k=x_k, t_v=x_v, t_do=x_do, t_dk=t_dk, t_dv=t_dv, p_lse=lse,
                p_delta=delta if t_dk else None, key_start=key_start,
            )  # fmt: skip
    return dq, dk, dv


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
    """As `reference.double_backward`."""
    from ttt_kernels.swa import triton_double_backward
    from ttt_kernels.swa.triton_launch import Call, located, located_or_none

    g_k, g_v = (None if g is None or g.shape[1] == 0 else g for g in (g_k, g_v))
    if q.numel() == 0 or (g_q is None and g_k is None and g_v is None):
        likes = zip((d_o, q, k, v), needs, strict=True)
        dobar, qbar, kbar, vbar = (t.new_zeros(t.shape) if need else None for t, need in likes)
        return dobar, qbar, kbar, vbar
    dobar, qbar, kbar, vbar = (
        t.new_empty(t.shape) if need else None for t, need in zip((d_o, q, k, v), needs, strict=True)
    )
    lse = lse.contiguous()
    r = torch.empty_like(lse)
    e, delta = (torch.empty_like(lse) if needs[1] or needs[2] else None for _ in range(2))
    call = Call(q, k, key_lengths, cu_seqlens, window, scale)
    shared = {
        "t_q": located(q), "t_k": located(k), "t_v": located(v), "t_do": located(d_o),
        "t_a": located_or_none(g_q), "t_b": located_or_none(g_k), "t_c": located_or_none(g_v),
        "p_lse": lse, "p_r": r, "p_e": e, "p_delta": delta, "key_start": key_start,
    }  # fmt: skip
    shifted = key_start > 0
    near = torch.empty_like(lse)
    for again in range(1 if g_q is None and g_k is None else 2):
        call.by_queries(
            "along", triton_double_backward.along,
            **shared, t_o=located(o), t_rest=located_or_none(o_rest), t_dobar=located_or_none(dobar),
            p_near=near, again=again, SHIFTED=shifted,
        )  # fmt: skip
    if qbar is not None:
        for first, count in parts("double_backward_queries", q.shape[3], q.dtype):
            call.by_queries(
                "double_backward_queries", triton_double_backward.queries,
                **shared, t_qbar=located(qbar), SHIFTED=shifted, FIRST=first, COUNT=count,
            )  # fmt: skip
    for t_kbar, t_vbar in _launches(located_or_none(kbar), located_or_none(vbar), q):
        for first, count in parts("double_backward_keys", q.shape[3], q.dtype):
            call.by_keys(
                "double_backward_keys", triton_double_backward.keys, k.shape[1],
                **shared, t_kbar=t_kbar, t_vbar=t_vbar, FIRST=first, COUNT=count,
            )  # fmt: skip
    return dobar, qbar, kbar, vbar
