"""Attention with tangents on the Triton kernels of triton_jvp_*.py, which a first call imports."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_kernels.swa.rest import empty_rest
from ttt_kernels.swa.triton_configs import parts, sums_together


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
    """As `reference_jvp.forward`."""
    from ttt_kernels.swa import triton_jvp_forward
    from ttt_kernels.swa.triton_launch import Call, located, located_or_none

    o, tangent = q.new_empty(q.shape), q.new_empty(q.shape)
    o_rest, tangent_rest = empty_rest(q, True), empty_rest(q, True)
    lse, r = (q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32) for _ in range(2))
    if o.numel() == 0:
        return o, tangent, lse, o_rest, r, tangent_rest
    if scale <= 0:
        # The kernel takes the largest product for the largest score.
        sign, scale = (-1, -scale) if scale < 0 else (0, 1.0)
        q, q_dot = q * sign, None if q_dot is None else q_dot * sign
    call = Call(q, k, key_lengths, cu_seqlens, window, scale)
    for first, count in parts("jvp_forward", q.shape[3], q.dtype):
        call.by_queries(
            "jvp_forward", triton_jvp_forward.attention,
            t_q=located(q), t_k=located(k), t_v=located(v),
            t_a=located_or_none(q_dot), t_b=located_or_none(k_dot), t_c=located_or_none(v_dot),
            t_o=located(o), t_rest=located_or_none(o_rest), t_odot=located(tangent),
            t_odot_rest=located_or_none(tangent_rest), p_lse=lse, p_r=r, key_start=key_start,
            SHIFTED=key_start > 0, FIRST=first, COUNT=count,
        )  # fmt: skip
    return o, tangent, lse, o_rest, r, tangent_rest


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
    """As `reference_jvp.backward`."""
    from ttt_kernels.swa import triton_jvp_backward
    from ttt_kernels.swa.triton_launch import Call, located, located_or_none

    own = k[:, key_start:]
    likes = zip((q, k, v, q, own, own), needs, strict=True)
    if q.numel() == 0:
        return tuple(t.new_zeros(t.shape) if need else None for t, need in likes)
    results = [t.new_empty(t.shape) if need else None for t, need in likes]
    names = ("t_qbar", "t_kbar", "t_vbar", "t_dq", "t_dk", "t_dv")
    found = {name: located_or_none(t) for name, t in zip(names, results, strict=True)}
    lse, r = lse.contiguous(), r.contiguous()
    delta, e = torch.empty_like(lse), torch.empty_like(lse)
    shared: dict[str, Any] = {
        "t_q": located(q), "t_k": located(k), "t_v": located(v), "t_a": located_or_none(q_dot),
        "t_x": located(d_o), "t_do": located(d_tangent), "p_lse": lse, "p_r": r, "p_e": e, "p_delta": delta,
        "key_start": key_start,
    }  # fmt: skip
    dots = {"t_b": located_or_none(k_dot), "t_c": located_or_none(v_dot)}
    call = Call(q, k, key_lengths, cu_seqlens, window, scale)
    of_queries = {name: found.pop(name) for name in ("t_qbar", "t_dq")}
    if any(needs):
        for first, count in parts("jvp_backward_queries", q.shape[3], q.dtype):
            call.by_queries(
                "jvp_backward_queries", triton_jvp_backward.queries,
                **shared, **dots, **of_queries, t_o=located(o), t_rest=located_or_none(o_rest),
                t_odot=located(tangent), t_odot_rest=located_or_none(tangent_rest),
                SHIFTED=key_start > 0, FIRST=first, COUNT=count,
            )  # fmt: skip
    nothing = dict.fromkeys(found)
    for name, begin, end, of_keys in (
        ("jvp_keys_before", 0, key_start, {"t_b": None, "t_c": None}),
        ("jvp_backward_keys", key_start, k.shape[1], dots),
    ):
        for together in sums_together(name, q.shape[3], q.dtype):
            sums = {result: found[result] for result in together}
            if begin == end or not any(sums.values()):
                continue
            for first, count in parts(name, q.shape[3], q.dtype):
                call.by_keys(
                    name, triton_jvp_backward.keys, end - begin,
                    **shared, **of_keys, **{**nothing, **sums}, first=begin, end=end,
                    MOVES=shared["t_a"] is not None or dots["t_b"] is not None, FIRST=first, COUNT=count,
                )  # fmt: skip
    return tuple(results)
