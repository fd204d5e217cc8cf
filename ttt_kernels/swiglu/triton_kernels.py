"""What stands between the products of SwiGLU in Triton, one pass over memory each.

A program has a block of elements of contiguous tensors of one shape. With s = 1 / (1 + e^-g): silu(g) = g s,
silu'(g) = s (1 + g (1 - s)) and silu''(g) = s (1 - s) (2 + g (1 - 2 s)).
"""

import triton
import triton.language as tl

from ttt_kernels.triton_values import narrow


@triton.jit
def _load(p_x, start, count, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Elements [start, start + BLOCK) in float32, at the EDGE only those below `count`; None is zero."""
    b_i = tl.arange(0, BLOCK)
    if p_x is None:
        return tl.zeros((BLOCK,), tl.float32)
    elif EDGE:
        return tl.load(p_x + start + b_i, mask=b_i < count - start, other=0.0).to(tl.float32)
    else:
        return tl.load(p_x + start + b_i).to(tl.float32)


@triton.jit
def _store(p_x, b_x, start, count, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Stores what `_load` loads, unless p_x is None, in the tensor's dtype."""
    b_i = tl.arange(0, BLOCK)
    if p_x is not None:
        b_narrow = narrow(b_x, p_x.dtype.element_ty)
        if EDGE:
            tl.store(p_x + start + b_i, b_narrow, mask=b_i < count - start)
        else:
            tl.store(p_x + start + b_i, b_narrow)


@triton.jit
def _forward(
    p_gate, p_up, p_hidden, p_kept_gate, p_kept_up, start, count, BLOCK: tl.constexpr, EDGE: tl.constexpr
):
    b_g = _load(p_gate, start, count, BLOCK, EDGE)
    b_u = _load(p_up, start, count, BLOCK, EDGE)
    _store(p_hidden, b_g * tl.sigmoid(b_g) * b_u, start, count, BLOCK, EDGE)
    _store(p_kept_gate, b_g, start, count, BLOCK, EDGE)
    _store(p_kept_up, b_u, start, count, BLOCK, EDGE)


@triton.jit(do_not_specialize=["count"])
def forward(p_gate, p_up, p_hidden, p_kept_gate, p_kept_up, count, BLOCK: tl.constexpr):
    """H, and G and U in another dtype, unless those are None."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # Without masks, accesses have 16 bytes whatever the count.
    if start + BLOCK <= count:
        _forward(p_gate, p_up, p_hidden, p_kept_gate, p_kept_up, start, count, BLOCK, False)
    else:
        _forward(p_gate, p_up, p_hidden, p_kept_gate, p_kept_up, start, count, BLOCK, True)


@triton.jit
def _backward(
    p_gate, p_up, p_dh, p_gbar, p_ubar, p_dg, p_du, p_hidden, start, count, BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    b_g = _load(p_gate, start, count, BLOCK, EDGE)
    b_u = _load(p_up, start, count, BLOCK, EDGE)
    b_dh = _load(p_dh, start, count, BLOCK, EDGE)
    b_s = tl.sigmoid(b_g)
    b_silu = b_g * b_s
    b_gbar = _load(p_gbar, start, count, BLOCK, EDGE)
    b_ubar = _load(p_ubar, start, count, BLOCK, EDGE)
    _store(p_dg, b_dh * b_u * (b_s + b_silu * (1 - b_s)) + b_gbar, start, count, BLOCK, EDGE)
    _store(p_du, b_dh * b_silu + b_ubar, start, count, BLOCK, EDGE)
    _store(p_hidden, b_silu * b_u, start, count, BLOCK, EDGE)


@triton.jit(do_not_specialize=["count"])
def backward(p_gate, p_up, p_dh, p_gbar, p_ubar, p_dg, p_du, p_hidden, count, BLOCK: tl.constexpr):
    """dG, dU and H, unless they are None; dH may be None, and so may what is added to dG and dU."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= count:
        _backward(p_gate, p_up, p_dh, p_gbar, p_ubar, p_dg, p_du, p_hidden, start, count, BLOCK, False)
    else:
        _backward(p_gate, p_up, p_dh, p_gbar, p_ubar, p_dg, p_du, p_hidden, start, count, BLOCK, True)


@triton.jit
def _double_backward(
    p_gate, p_up, p_dh, p_hbar, p_tg, p_tu, p_th, p_gbar, p_ubar, p_dg, p_du, p_hidden, start, count,
    BLOCK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    b_g = _load(p_gate, start, count, BLOCK, EDGE)
    b_u = _load(p_up, start, count, BLOCK, EDGE)
    b_dh = _load(p_dh, start, count, BLOCK, EDGE)
    b_hbar = _load(p_hbar, start, count, BLOCK, EDGE)
    b_tg = _load(p_tg, start, count, BLOCK, EDGE)
    b_tu = _load(p_tu, start, count, BLOCK, EDGE)
    b_s = tl.sigmoid(b_g)
    b_rest = 1 - b_s
    b_silu = b_g * b_s
    b_slope = b_s + b_silu * b_rest
    b_curve = b_s * b_rest * (2 + b_g * (b_rest - b_s))
    _store(p_th, b_slope * b_u * b_tg + b_silu * b_tu, start, count, BLOCK, EDGE)
    b_gbar = b_dh * (b_curve * b_u * b_tg + b_slope * b_tu) + b_hbar * b_slope * b_u
    _store(p_gbar, b_gbar, start, count, BLOCK, EDGE)
    _store(p_ubar, b_dh * b_slope * b_tg + b_hbar * b_silu, start, count, BLOCK, EDGE)
    _store(p_dg, b_dh * b_u * b_slope, start, count, BLOCK, EDGE)
    _store(p_du, b_dh * b_silu, start, count, BLOCK, EDGE)
    _store(p_hidden, b_silu * b_u, start, count, BLOCK, EDGE)


@triton.jit(do_not_specialize=["count"])
def double_backward(
    p_gate, p_up, p_dh, p_hbar, p_tg, p_tu, p_th, p_gbar, p_ubar, p_dg, p_du, p_hidden, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """H^, the cotangents of G and U, dG, dU and H, unless they are None; given tensors but G and U may be too."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= count:
        _double_backward(
            p_gate, p_up, p_dh, p_hbar, p_tg, p_tu, p_th, p_gbar, p_ubar, p_dg, p_du, p_hidden, start, count,
            BLOCK, False,
        )  # fmt: skip
    else:
        _double_backward(
            p_gate, p_up, p_dh, p_hbar, p_tg, p_tu, p_th, p_gbar, p_ubar, p_dg, p_du, p_hidden, start, count,
            BLOCK, True,
        )  # fmt: skip
