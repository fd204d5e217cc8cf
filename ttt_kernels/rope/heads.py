"""Queries, keys and values of an attention branch with QK-norm, from its first product and back, where nothing records.

On Triton kernels alone; elsewhere it is `rms_norm` and `rope`, one after the other, and copies.
"""

import math

import torch
from torch import Tensor

from ttt_kernels import triton_launch
from ttt_kernels.rope.triton_configs import WIDEST_HEAD, configs_of_heads

Located = tuple[Tensor, int, int, int]


def serves(head_dim: int) -> bool:
    """Whether there are kernels for heads of this dimension."""
    return head_dim <= WIDEST_HEAD


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    theta: float,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """rope(rms_norm(q)) and rope(rms_norm(k)) by head, interleaved, not rounded between the two, and v.

    Args:
        q, k, v: (B, T, H, D) of one dtype, D even.
        positions: (T,), integers.
        q_weight, k_weight: (D,)
        eps: added to the mean square.
        theta: base of the frequencies.
        into: (B, T, H, D) each with unit stride in D, where keys and values go; None: to memory of their own, and
            values stay where they are.

    Returns:
        q, k, v, and the reciprocal root mean squares (B, T, H) fp32 of q and of k.
    """
    from ttt_kernels.rope import triton_heads

    y = q.new_empty(q.shape)
    keys, values = into or (k.new_empty(k.shape), v)
    q_rstd, k_rstd = (q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(2))
    moved = (None, None) if into is None else (_located(v), _located(values))
    _launch("forward", triton_heads.forward, q, positions, theta, {
        "t_q": _located(q), "t_k": _located(k), "t_v": moved[0], "t_to_q": _located(y), "t_to_k": _located(keys),
        "t_to_v": moved[1], "p_q_weight": q_weight.contiguous(), "p_k_weight": k_weight.contiguous(),
        "p_q_rstd": q_rstd, "p_k_rstd": k_rstd, "eps": eps,
    })  # fmt: skip
    return y, keys, values, q_rstd, k_rstd


def backward(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    theta: float,
) -> Tensor:
    """Gradients (B, T, 3, H, D) of q, k and v, given those of `forward`'s results; the rest is as there."""
    from ttt_kernels.rope import triton_heads

    found = q.new_empty((*q.shape[:2], 3, *q.shape[2:]))
    to_q, to_k, to_v = map(_located, found.unbind(2))
    _launch("backward", triton_heads.backward, q, positions, theta, {
        "t_dq": _located(d_q), "t_dk": _located(d_k), "t_dv": _located(d_v), "t_q": _located(q), "t_k": _located(k),
        "p_q_weight": q_weight.contiguous(), "p_k_weight": k_weight.contiguous(), "p_q_rstd": q_rstd,
        "p_k_rstd": k_rstd, "t_to_q": to_q, "t_to_k": to_k, "t_to_v": to_v,
    })  # fmt: skip
    return found


def _located(t: Tensor) -> Located:
    """A tensor with its strides of sequences, positions and heads, those of elements being 1."""
    if t.stride(3) != 1:
        t = t.contiguous()
    return t, t.stride(0), t.stride(1), t.stride(2)


def _launch(
    name: str, kernel: object, q: Tensor, positions: Tensor, theta: float, arguments: dict[str, object]
) -> None:
    b, t, heads, d = q.shape
    if not q.numel():
        return

    def programs(sizes: dict[str, int]) -> int:
        return b * -(-t // sizes["POSITIONS"]) * -(-heads // sizes["HEADS"])

    step = -2 / d * math.log2(theta)
    triton_launch.launch(
        f"rope.heads_{name}", kernel, programs, configs_of_heads(d, heads), (q.dtype, d, heads), q.device,
        {**arguments, "p_positions": positions.contiguous(), "T": t, "H": heads, "D": d, "STEP": step},
    )  # fmt: skip
