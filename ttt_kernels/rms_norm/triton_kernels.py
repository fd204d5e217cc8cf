"""RMSNorm's three orders and its twin's backward in Triton, each in one pass over memory; letters as in reference.py.

A program that sums over rows has `span` of them, and a row of `p_partial` for its sum; `total` adds these up, so that
the order of every sum is the same in every run.
"""

import triton
import triton.language as tl

from ttt_kernels.rms_norm.triton_rows import load, load_vector, mean, store
from ttt_kernels.triton_values import narrow


@triton.jit
def _store_partial(p_partial, b_sum, N: tl.constexpr, BLOCK: tl.constexpr):
    b_column = tl.arange(0, BLOCK)
    p_row = p_partial + tl.program_id(0).to(tl.int64) * N
    tl.store(p_row + b_column, tl.sum(b_sum, 0), mask=b_column < N)


@triton.jit(do_not_specialize=["rows", "middle", "inner"])
def forward(
    t_x, p_weight, t_residual, p_y, p_rstd, eps, rows, middle, inner,
    N: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x r w + residual, and r."""
    b_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b_x = load(t_x, b_row, rows, middle, inner, N, BLOCK, RANK).to(tl.float32)
    b_r = tl.div_rn(1.0, tl.sqrt_rn(mean(b_x * b_x, N) + eps))
    b_y = b_x * b_r * load_vector(p_weight, N, BLOCK)
    if t_residual is not None:
        b_y += load(t_residual, b_row, rows, middle, inner, N, BLOCK, RANK).to(tl.float32)
    store(p_y, b_y, b_row, rows, N, BLOCK)
    tl.store(p_rstd + b_row[:, None], b_r, mask=(b_row < rows)[:, None])


@triton.jit(do_not_specialize=["rows", "middle", "inner", "span"])
def backward(
    t_dy, t_x, p_weight, p_rstd, p_dx, p_partial, p_residual, rows, middle, inner, span,
    N: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = r (w dy - h mean(w dy h)), parts of dw = sum of dy h, and the residual's gradient dy."""
    b_w = load_vector(p_weight, N, BLOCK)
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    tiles = 1 if p_partial is None else span // ROWS
    for tile in tl.range(tiles):
        b_row = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        b_raw = load(t_dy, b_row, rows, middle, inner, N, BLOCK, RANK)
        b_x = load(t_x, b_row, rows, middle, inner, N, BLOCK, RANK).to(tl.float32)
        b_r = tl.load(p_rstd + b_row, mask=b_row < rows, other=0.0)[:, None]
        b_dy = b_raw.to(tl.float32)
        b_h = b_x * b_r
        if p_dx is not None:
            b_dh = b_dy * b_w
            b_dx = b_r * (b_dh - b_h * mean(b_dh * b_h, N))
            store(p_dx, b_dx, b_row, rows, N, BLOCK)
        if p_partial is not None:
            b_sum += b_dy * b_h
        if p_residual is not None:
            store(p_residual, b_dy, b_row, rows, N, BLOCK)
    if p_partial is not None:
        _store_partial(p_partial, b_sum, N, BLOCK)


@triton.jit(do_not_specialize=["rows", "middle", "inner", "span"])
def double_backward(
    t_a, p_b, t_z, t_dy, t_x, p_weight, p_rstd, p_to_dy, p_to_x, p_partial, rows, middle, inner, span,
    N: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cotangents of dy and x, and parts of w's, given a of dx, b of dw and z of the residual's gradient.

    With m = mean(w dy h), p = mean(a h), q = mean(a w dy) and e = r (a - h p), the cotangent of w dy:
    e w + b h + z, r (b dy - r (m a + p w dy)) - r h (mean(b dy h) + r (q - 3 m p)), and the sum of e dy.
    """
    b_w = load_vector(p_weight, N, BLOCK)
    if p_b is not None:
        b_b = load_vector(p_b, N, BLOCK)
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    tiles = 1 if p_partial is None else span // ROWS
    for tile in tl.range(tiles):
        b_row = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        b_dy = load(t_dy, b_row, rows, middle, inner, N, BLOCK, RANK).to(tl.float32)
        b_x = load(t_x, b_row, rows, middle, inner, N, BLOCK, RANK).to(tl.float32)
        b_r = tl.load(p_rstd + b_row, mask=b_row < rows, other=0.0)[:, None]
        b_h = b_x * b_r
        b_to_dh = tl.zeros((ROWS, BLOCK), tl.float32)
        b_to_h = tl.zeros((ROWS, BLOCK), tl.float32)
        b_of_h = tl.zeros((ROWS, 1), tl.float32)
        b_to_dy = b_to_dh
        if t_a is not None:
            b_a = load(t_a, b_row, rows, middle, inner, N, BLOCK, RANK).to(tl.float32)
            b_dh = b_dy * b_w
            b_p = mean(b_a * b_h, N)
            b_to_dh = b_r * (b_a - b_h * b_p)
            b_to_dy = b_to_dh * b_w
            if p_to_x is not None:
                b_m = mean(b_dh * b_h, N)
                b_of_h = b_r * (mean(b_a * b_dh, N) - 3.0 * b_m * b_p)
                b_to_h = -b_r * (b_m * b_a + b_p * b_dh)
        if p_b is not None:
            b_to_dy += b_b * b_h
            if p_to_x is not None:
                b_to_h += b_b * b_dy
                b_of_h += mean(b_b * b_dy * b_h, N)
        if p_to_x is not None:
            store(p_to_x, b_r * (b_to_h - b_h * b_of_h), b_row, rows, N, BLOCK)
        if p_to_dy is not None:
            if t_z is not None:
                b_to_dy += load(t_z, b_row, rows, middle, inner, N, BLOCK, RANK).to(tl.float32)
            store(p_to_dy, b_to_dy, b_row, rows, N, BLOCK)
        if p_partial is not None:
            b_sum += b_to_dh * b_dy
    if p_partial is not None:
        _store_partial(p_partial, b_sum, N, BLOCK)


@triton.jit(do_not_specialize=["rows", "middle", "inner", "span"])
def jvp_backward(
    t_dy, t_u, t_x, t_a, p_b, p_weight, p_rstd, p_dx, p_da, p_partial, p_residual, p_residual_dot, rows, middle, inner,
    span, N: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cotangents of x, of its tangent a and of both residuals, and parts of w's, given dy and u of y's tangent.

    With w's tangent b and e, m, p and q of `double_backward`, there for dy = u: u's and dy's terms of x's cotangent are
    summed before they are rounded.
    """
    b_w = load_vector(p_weight, N, BLOCK)
    if p_b is not None:
        b_b = load_vector(p_b, N, BLOCK)
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    tiles = 1 if p_partial is None else span // ROWS
    for tile in tl.range(tiles):
        b_row = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        b_dy = load(t_dy, b_row, rows, middle, inner, N, BLOCK, RANK).to(tl.float32)
        b_u = load(t_u, b_row, rows, middle, inner, N, BLOCK, RANK).to(tl.float32)
        b_x = load(t_x, b_row, rows, middle, inner, N, BLOCK, RANK).to(tl.float32)
        b_r = tl.load(p_rstd + b_row, mask=b_row < rows, other=0.0)[:, None]
        b_h = b_x * b_r
        b_of_w = b_dy * b_h
        # Cotangents of h: b_to_h, and b_of_h along h itself.
        b_to_h = b_dy * b_w
        b_of_h = mean(b_to_h * b_h, N)
        b_dh = b_u * b_w
        b_m = mean(b_dh * b_h, N)
        if t_a is not None:
            b_a = load(t_a, b_row, rows, middle, inner, N, BLOCK, RANK).to(tl.float32)
            b_p = mean(b_a * b_h, N)
            b_of_w += b_r * (b_a - b_h * b_p) * b_u
            b_to_h -= b_r * (b_m * b_a + b_p * b_dh)
            b_of_h += b_r * (mean(b_a * b_dh, N) - 3.0 * b_m * b_p)
        if p_b is not None:
            b_to_h += b_b * b_u
            b_of_h += mean(b_b * b_u * b_h, N)
        if p_dx is not None:
            store(p_dx, b_r * (b_to_h - b_h * b_of_h), b_row, rows, N, BLOCK)
        if p_da is not None:
            store(p_da, b_r * (b_dh - b_h * b_m), b_row, rows, N, BLOCK)
        if p_partial is not None:
            b_sum += b_of_w
        if p_residual is not None:
            store(p_residual, b_dy, b_row, rows, N, BLOCK)
        if p_residual_dot is not None:
            store(p_residual_dot, b_u, b_row, rows, N, BLOCK)
    if p_partial is not None:
        _store_partial(p_partial, b_sum, N, BLOCK)


@triton.jit(do_not_specialize=["count"])
def total(p_partial, p_sum, count, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of `count` rows in p_sum's dtype; a program sums BLOCK columns."""
    b_column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(0, count, ROWS):
        b_row = first + tl.arange(0, ROWS)
        m_inside = (b_row < count)[:, None] & (b_column < N)[None, :]
        b_sum += tl.load(p_partial + b_row[:, None] * N + b_column[None, :], mask=m_inside, other=0.0)
    tl.store(p_sum + b_column, narrow(tl.sum(b_sum, 0), p_sum.dtype.element_ty), mask=b_column < N)
