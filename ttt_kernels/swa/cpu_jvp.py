"""Attention with tangents on the C++ kernels of csrc/cpu/swa_*.cpp."""

from collections.abc import Sequence

from torch import Tensor

from ttt_kernels.swa import cpu


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
    """As `reference_jvp.forward`: the forward, and the first sweep of a double backward, which gives the tangent."""
    inputs = (q, k, v, key_lengths, cu_seqlens)
    o, lse, o_rest = cpu.forward(*inputs, window, scale, key_start, True)
    saved = (*inputs, o, lse, o_rest, window, scale, key_start)
    # The tangent does not depend on a cotangent of the output: any tensor like it will do.
    _, along = cpu.second((q_dot, k_dot, v_dot), None, o, saved, (True, *[False] * 6), keep=True)
    assert along is not None
    return o, along.tangent, lse, o_rest, along.r, along.rest


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
    """As `reference_jvp.backward`, in one kernel: the second sweep of a double backward."""
    saved = (q, k, v, key_lengths, cu_seqlens, o, lse, o_rest, window, scale, key_start)
    known = cpu.Along(tangent, tangent_rest, r)
    dots = (q_dot, k_dot, v_dot)
    if not any(needs[:3]):
        return None, None, None, *cpu.backward(d_tangent, *saved, True, needs[3:])
    return cpu.second(dots, d_o, d_tangent, saved, (False, *needs), known)[0][1:]
