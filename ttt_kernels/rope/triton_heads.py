"""What stands between an attention branch's first product and attention in Triton, and its way back: one pass each.

Queries and keys are normalized by head and turned by their positions; nothing is rounded between the two. A program has
POSITIONS positions of HEADS heads, of queries, keys and values alike. Names are those of triton_kernels.py; `t_` has
strides of sequences, positions and heads.
"""

import triton
import triton.language as tl

from ttt_kernels.rms_norm.triton_rows import load_vector, mean
from ttt_kernels.rope.triton_angles import angles, rows_of_head, turned
from ttt_kernels.triton_values import narrow


@triton.jit
def _place(T, H: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr):
    """The program's sequence, its positions in 64 bits, and its first head."""
    groups = (H + HEADS - 1) // HEADS
    blocks = tl.cdiv(T, POSITIONS)
    index = tl.program_id(0)
    b_t = index // groups % blocks * POSITIONS + tl.arange(0, POSITIONS)
    return (index // groups // blocks).to(tl.int64), b_t.to(tl.int64), index % groups * HEADS


@triton.jit
def _inside(b_t, T, head, H: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr):
    """The mask of a head's elements, none where there is no such head."""
    m_inside = rows_of_head(b_t, T, head, H)
    if D != 2 * PAIRS:
        m_inside = m_inside & (tl.arange(0, 2 * PAIRS) < D)[None, :]
    return m_inside


@triton.jit
def _at(t, sequence, b_t, head, PAIRS: tl.constexpr):
    """Addresses of a head's elements."""
    p_row = t[0] + sequence * t[1] + b_t[:, None] * t[2] + tl.cast(head, tl.int64) * t[3]
    return p_row + tl.arange(0, 2 * PAIRS)[None, :]


@triton.jit
def _forward(
    b_raw, b_weight, b_cos, b_sin, t_y, p_rstd, sequence, b_t, head, T, eps,
    H: tl.constexpr, D: tl.constexpr, POSITIONS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One head of queries or keys."""
    b_x = b_raw.to(tl.float32)
    b_r = tl.div_rn(1.0, tl.sqrt_rn(mean(b_x * b_x, D) + eps))
    b_y = turned(b_x * b_r * b_weight, b_cos, b_sin, POSITIONS, PAIRS)
    m_inside = _inside(b_t, T, head, H, D, PAIRS)
    tl.store(_at(t_y, sequence, b_t, head, PAIRS), narrow(b_y, t_y[0].dtype.element_ty), mask=m_inside)
    m_row = rows_of_head(b_t, T, head, H)
    tl.store(p_rstd + ((sequence * T + b_t) * H + head)[:, None], b_r, mask=m_row)


@triton.jit(do_not_specialize=["T"])
def forward(
    t_q, t_k, t_v, p_positions, p_q_weight, p_k_weight, t_to_q, t_to_k, t_to_v, p_q_rstd, p_k_rstd, eps, T,
    H: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr,
    POSITIONS: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """q and k normalized and turned, their reciprocal root mean squares, and v where it goes unless t_v is None."""
    sequence, b_t, first = _place(T, H, POSITIONS, HEADS)
    b_cos, b_sin = angles(tl.load(p_positions + b_t, mask=b_t < T, other=0), STEP, PAIRS)
    b_wq = load_vector(p_q_weight, D, 2 * PAIRS)
    b_wk = load_vector(p_k_weight, D, 2 * PAIRS)
    # No load waits for a store that it might read from.
    b_heads = ()
    for i in tl.static_range(HEADS):
        m_inside = _inside(b_t, T, first + i, H, D, PAIRS)
        b_q = tl.load(_at(t_q, sequence, b_t, first + i, PAIRS), mask=m_inside, other=0.0)
        b_k = tl.load(_at(t_k, sequence, b_t, first + i, PAIRS), mask=m_inside, other=0.0)
        b_heads = b_heads + ((b_q, b_k),)
    if t_v is not None:
        for i in tl.static_range(HEADS):
            m_inside = _inside(b_t, T, first + i, H, D, PAIRS)
            b_v = tl.load(_at(t_v, sequence, b_t, first + i, PAIRS), mask=m_inside, other=0.0)
            tl.store(_at(t_to_v, sequence, b_t, first + i, PAIRS), b_v, mask=m_inside)
    for i in tl.static_range(HEADS):
        _forward(
            b_heads[i][0], b_wq, b_cos, b_sin, t_to_q, p_q_rstd, sequence, b_t, first + i, T, eps,
            H, D, POSITIONS, PAIRS,
        )  # fmt: skip
        _forward(
            b_heads[i][1], b_wk, b_cos, b_sin, t_to_k, p_k_rstd, sequence, b_t, first + i, T, eps,
            H, D, POSITIONS, PAIRS,
        )  # fmt: skip


@triton.jit
def _backward(
    b_dy, b_raw, b_weight, b_cos, b_sin, t_dx, p_rstd, sequence, b_t, head, T,
    H: tl.constexpr, D: tl.constexpr, POSITIONS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One head of queries or keys: the gradient turned back, then dx = r (w dy - h mean(w dy h))."""
    m_row = rows_of_head(b_t, T, head, H)
    b_r = tl.load(p_rstd + ((sequence * T + b_t) * H + head)[:, None], mask=m_row, other=0.0)
    b_dh = turned(b_dy.to(tl.float32), b_cos, -b_sin, POSITIONS, PAIRS) * b_weight
    b_h = b_raw.to(tl.float32) * b_r
    b_dx = b_r * (b_dh - b_h * mean(b_dh * b_h, D))
    m_inside = _inside(b_t, T, head, H, D, PAIRS)
    tl.store(_at(t_dx, sequence, b_t, head, PAIRS), narrow(b_dx, t_dx[0].dtype.element_ty), mask=m_inside)


@triton.jit(do_not_specialize=["T"])
def backward(
    t_dq, t_dk, t_dv, t_q, t_k, p_positions, p_q_weight, p_k_weight, p_q_rstd, p_k_rstd, t_to_q, t_to_k, t_to_v, T,
    H: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr,
    POSITIONS: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Gradients of what `forward` was given; that of v is copied."""
    sequence, b_t, first = _place(T, H, POSITIONS, HEADS)
    b_cos, b_sin = angles(tl.load(p_positions + b_t, mask=b_t < T, other=0), STEP, PAIRS)
    b_wq = load_vector(p_q_weight, D, 2 * PAIRS)
    b_wk = load_vector(p_k_weight, D, 2 * PAIRS)
    b_heads = ()
    for i in tl.static_range(HEADS):
        m_inside = _inside(b_t, T, first + i, H, D, PAIRS)
        b_dq = tl.load(_at(t_dq, sequence, b_t, first + i, PAIRS), mask=m_inside, other=0.0)
        b_dk = tl.load(_at(t_dk, sequence, b_t, first + i, PAIRS), mask=m_inside, other=0.0)
        b_dv = tl.load(_at(t_dv, sequence, b_t, first + i, PAIRS), mask=m_inside, other=0.0)
        b_q = tl.load(_at(t_q, sequence, b_t, first + i, PAIRS), mask=m_inside, other=0.0)
        b_k = tl.load(_at(t_k, sequence, b_t, first + i, PAIRS), mask=m_inside, other=0.0)
        b_heads = b_heads + ((b_dq, b_dk, b_dv, b_q, b_k),)
    for i in tl.static_range(HEADS):
        m_inside = _inside(b_t, T, first + i, H, D, PAIRS)
        tl.store(_at(t_to_v, sequence, b_t, first + i, PAIRS), b_heads[i][2], mask=m_inside)
        _backward(
            b_heads[i][0], b_heads[i][3], b_wq, b_cos, b_sin, t_to_q, p_q_rstd, sequence, b_t, first + i, T,
            H, D, POSITIONS, PAIRS,
        )  # fmt: skip
        _backward(
            b_heads[i][1], b_heads[i][4], b_wk, b_cos, b_sin, t_to_k, p_k_rstd, sequence, b_t, first + i, T,
            H, D, POSITIONS, PAIRS,
        )  # fmt: skip
