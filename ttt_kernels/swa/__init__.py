"""Causal attention over a sliding window."""

from torch import Tensor

from ttt_kernels import tangents
from ttt_kernels.backends import refuse_on_cpu
from ttt_kernels.extension import compute_dtype
from ttt_kernels.jvp import twin_of_kernels
from ttt_kernels.registry import Operator
from ttt_kernels.swa import check, cpu, cpu_jvp, reference, reference_jvp, triton, triton_jvp
from ttt_kernels.swa.rest import empty_rest, recorded


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
    key_start: int,
    keep_rest: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    b, tq, heads, _ = q.shape
    statistics = q.new_empty((b, heads, tq), dtype=compute_dtype(q.dtype))
    return q.new_empty(q.shape), statistics, empty_rest(q, keep_rest)


def _fake_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
    key_start: int,
    keep_rest: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q, k[:, key_start:], v[:, key_start:]


operator = Operator(
    name="swa",
    inputs={"q": "Tensor", "k": "Tensor", "v": "Tensor", "key_lengths": "Tensor?", "cu_seqlens": "Tensor?"},
    params={"window": "int?", "scale": "float", "key_start": "int", "keep_rest": "bool"},
    outputs={"o": "Tensor"},
    saved={"lse": "Tensor", "o_rest": "Tensor"},
    differentiable=("q", "k", "v"),
    fake=_fake,
    kernels={
        "reference": {
            "forward": reference.forward,
            "backward": reference.backward,
            "double_backward": reference.double_backward,
        },
        "cpu": {
            "forward": cpu.forward,
            "backward": cpu.backward,
            "double_backward": cpu.double_backward,
        },
        "triton": {
            "forward": triton.forward,
            "backward": triton.backward,
            "double_backward": triton.double_backward,
        },
    },
    refusals={"cpu": refuse_on_cpu, "triton": triton.refuse},
    keeps=("o",),
    fake_backward=_fake_backward,
)
"""Attention as a registered operator. Its parameter `key_start` (0 in public calls) says from which key on
`backward` gives gradients of keys and values, for callers that hold keys which need none; the derivatives of such
a backward are exact too.

Where `keep_rest`, `o_rest` is what 16-bit `o` lost to rounding, rounded itself; otherwise it has no elements. A row's
sum of dO * O stands against sums of exact products dO V^T, and where values have something in common the difference
is smaller than what `o` lost."""


def _fake_jvp(
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
    o, lse, o_rest = _fake(q, k, v, key_lengths, cu_seqlens, window, scale, key_start, True)
    return o, o.new_empty(o.shape), lse, o_rest, lse.new_empty(lse.shape), o_rest.new_empty(o_rest.shape)


jvp_operator = twin_of_kernels(
    operator,
    {
        "reference": {"forward": reference_jvp.forward, "backward": reference_jvp.backward},
        "cpu": {"forward": cpu_jvp.forward, "backward": cpu_jvp.backward},
        "triton": {"forward": triton_jvp.forward, "backward": triton_jvp.backward},
    },
    _fake_jvp,
    saved={"lse": "Tensor", "o_rest": "Tensor", "r": "Tensor", "tangent_rest": "Tensor"},
    fixed=("keep_rest",),
    keeps=("o", "tangent"),
)
"""Its tangents of keys and values are those from `key_start` on; keys before have none, but gradients.

With what the tangent lost to rounding and the rows' sums r of P * S', its backward needs no pass over the keys for what
the rows' sums in it are."""


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax attention in which a query sees itself and the `window - 1` keys before it.

    Query i stands at key position Tk - Tq + i. A query that sees no valid key gives 0, with zero gradients.

    Args:
        q: (B, Tq, Hq, D), any floating dtype; softmax statistics are float32 (float64 for float64). Weights of
            keys that a query does not see are zeros in a product, so those must hold finite values, but for the
            keys that `key_lengths` hides.
        k, v: (B, Tk, Hk, D), q's dtype; Tk >= Tq, and Hq a multiple of Hk: query head h uses head
            h // (Hq / Hk).
        window: keys that a query sees at most, itself included; None for all up to its position.
        scale: factor of the scores; D**-0.5 where None.
        key_lengths: (B,) int64 or int32, from 0 to Tk: only that many trailing keys of each sequence are
            valid. What the others hold, NaN included, never reaches a result.
        cu_seqlens: (n + 1,) int64 or int32, from 0 to Tk and not falling: boundaries of n sequences packed in
            a batch of 1 with Tq = Tk; a query sees keys of its own sequence only.
        backend: None for the best that can run, or a backend's name.

    Returns:
        (B, Tq, Hq, D) in q's dtype. Differentiable twice with respect to q, k and v (any number of times on
        the reference backend).

    Raises:
        ValueError: an argument has an unsuitable shape, dtype, device or value, or the backend cannot serve
            the call. The numbers in key_lengths and cu_seqlens are checked for CPU tensors (inside
            torch.compile by the cpu backend only).
    """
    check.arguments("sliding_window_attention", q, k, v, window, scale, key_lengths, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    chosen = operator.select(backend, q, k, v, key_lengths, cu_seqlens)
    arguments = (q, k, v, key_lengths, cu_seqlens, window, scale, 0, recorded(q, k, v))
    return operator.forward(*arguments, backend=chosen)[0]


def sliding_window_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None = None,
    k_dot: Tensor | None = None,
    v_dot: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`sliding_window_attention` and its directional derivative along the tangents of its arguments.

    Args:
        q, k, v, window, scale, key_lengths, cu_seqlens: as for `sliding_window_attention`.
        q_dot, k_dot, v_dot: like their arguments; None for zero.
        backend: None for the best that can run, or a backend's name.

    Returns:
        Output and tangent, each (B, Tq, Hq, D) in q's dtype. Differentiable once in reverse with respect to all
        six tensors (any number of times on the reference backend).

    Raises:
        ValueError: an argument has an unsuitable shape, dtype, device or value, or the backend cannot serve
            the call.
    """
    name = "sliding_window_attention_jvp"
    check.arguments(name, q, k, v, window, scale, key_lengths, cu_seqlens)
    tangents.check(name, q=(q, q_dot), k=(k, k_dot), v=(v, v_dot))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    tensors = (q, k, v, key_lengths, cu_seqlens, q_dot, k_dot, v_dot)
    chosen = jvp_operator.select(backend, *tensors)
    o, tangent, *_ = jvp_operator.forward(*tensors, window, scale, 0, backend=chosen)
    return o, tangent
