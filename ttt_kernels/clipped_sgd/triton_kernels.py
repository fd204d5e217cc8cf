"""Clipped SGD in Triton after the inner products of triton_sums.py: letters as in reference.py.

Every program adds up the products' parts of its own sequence, so that nothing is launched between. A sequence's first
program also stores what there is one of per sequence.
"""

import triton
import triton.language as tl

from ttt_kernels.clipped_sgd.triton_sums import norm_scale, number, total
from ttt_kernels.clipped_sgd.triton_tuples import chunk_of, load, load_sum, sequence_of, store
from ttt_kernels.triton_values import narrow


@triton.jit(do_not_specialize=["steps", "chunks", "max_norm", "lr", "active_stride"])
def step(
    t_w, t_g, t_new, t_copy, p_partial, p_norm, p_active, active_stride, lr, max_norm, counts, steps, chunks,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """new = W - lr s g and its copy where a sequence is active, and n."""
    sequence, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    norm, _, scale, _ = norm_scale(p_partial, max_norm, sequence, chunks, PARTS)
    if chunk == 0:
        tl.store(p_norm + sequence, norm.to(tl.float32))
    factor = (number(lr) * scale).to(tl.float32)
    index, start, whole, blocks, count = chunk_of(counts, steps, chunk, BLOCK)
    if p_active is not None:
        active = tl.load(p_active + sequence.to(tl.int64) * active_stride) != 0
        whole = tl.where(active, whole, 0)
        blocks = tl.where(active, blocks, 0)
    p_w = sequence_of(t_w, index, sequence)
    p_g = sequence_of(t_g, index, sequence)
    p_new = sequence_of(t_new, index, sequence)
    p_copy = sequence_of(t_copy, index, sequence)
    for EDGE in tl.static_range(2):
        for i in tl.range(whole if EDGE else 0, blocks if EDGE else whole):
            first = start + tl.cast(i, tl.int64) * BLOCK
            b_g = load(p_g, first, count, BLOCK, EDGE)
            b_new = load(p_w, first, count, BLOCK, EDGE) - factor * b_g
            store(p_new, b_new, first, count, BLOCK, EDGE)
            if p_copy is not None:
                b_rounded = narrow(b_new, p_new.dtype.element_ty).to(tl.float32)
                store(p_copy, b_rounded, first, count, BLOCK, EDGE)


@triton.jit(do_not_specialize=["steps", "chunks", "max_norm", "lr", "norm_stride"])
def backward(
    t_g, t_l, t_c, t_dw, t_dg, p_partial, p_dnorm, norm_stride, lr, max_norm, counts, steps, chunks,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dW = l + c, and dg = -eta s l + (eta k <g, l> + m / n) g."""
    sequence, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    index, start, whole, blocks, count = chunk_of(counts, steps, chunk, BLOCK)
    p_g = sequence_of(t_g, index, sequence)
    p_l = sequence_of(t_l, index, sequence)
    p_c = sequence_of(t_c, index, sequence)
    p_dw = sequence_of(t_dw, index, sequence)
    p_dg = sequence_of(t_dg, index, sequence)
    if p_dg is not None:
        _, inverse, scale, k = norm_scale(p_partial, max_norm, sequence, chunks, PARTS)
        m = tl.load(p_dnorm + sequence.to(tl.int64) * norm_stride).to(tl.float64)
        eta = number(lr)
        of_l = (-eta * scale).to(tl.float32)
        of_g = (eta * k * total(p_partial, 1, sequence, chunks, PARTS) + m * inverse).to(tl.float32)
    for EDGE in tl.static_range(2):
        for i in tl.range(whole if EDGE else 0, blocks if EDGE else whole):
            first = start + tl.cast(i, tl.int64) * BLOCK
            b_l = load_sum(p_l, p_c, first, count, BLOCK, EDGE)
            if p_dg is not None:
                b_dg = of_l * b_l + of_g * load(p_g, first, count, BLOCK, EDGE)
                store(p_dg, b_dg, first, count, BLOCK, EDGE)
            if p_dw is not None:
                store(p_dw, b_l, first, count, BLOCK, EDGE)


@triton.jit(do_not_specialize=["steps", "chunks", "max_norm", "lr", "of_lr", "norm_stride"])
def double_backward(
    t_g, t_l, t_c, t_u, t_a, t_to_l, t_to_c, t_to_g, p_to_norm, p_partial, p_dnorm, norm_stride, lr, of_lr, max_norm,
    counts, steps, chunks, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The cotangents of l and c, of g, and of m, given A, G (here u) and r (here of_lr)."""
    sequence, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    _, inverse, s, k = norm_scale(p_partial, max_norm, sequence, chunks, PARTS)
    m = tl.load(p_dnorm + sequence.to(tl.int64) * norm_stride).to(tl.float64)
    eta, r = number(lr), number(of_lr)
    h = total(p_partial, 1, sequence, chunks, PARTS)
    a, b = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    if t_u is not None:
        a = total(p_partial, 2, sequence, chunks, PARTS)
        b = total(p_partial, 3, sequence, chunks, PARTS)
    if p_to_norm is not None:  # noqa: SIM102, what is missing is decided before a kernel runs
        if chunk == 0:
            tl.store(p_to_norm + sequence, (a * inverse).to(tl.float32))
    shared = (eta * k * a - r * s).to(tl.float32)
    l_of_u = (-eta * s).to(tl.float32)
    g_of_u = (eta * k * h + m * inverse).to(tl.float32)
    g_of_g = (
        k * (eta * b - 3.0 * eta * h * a * inverse * inverse + r * h) - m * a * inverse * inverse * inverse
    )
    g_of_g = g_of_g.to(tl.float32)
    index, start, whole, blocks, count = chunk_of(counts, steps, chunk, BLOCK)
    p_g = sequence_of(t_g, index, sequence)
    p_l = sequence_of(t_l, index, sequence)
    p_c = sequence_of(t_c, index, sequence)
    p_u = sequence_of(t_u, index, sequence)
    p_a = sequence_of(t_a, index, sequence)
    p_to_l = sequence_of(t_to_l, index, sequence)
    p_to_c = sequence_of(t_to_c, index, sequence)
    p_to_g = sequence_of(t_to_g, index, sequence)
    for EDGE in tl.static_range(2):
        for i in tl.range(whole if EDGE else 0, blocks if EDGE else whole):
            first = start + tl.cast(i, tl.int64) * BLOCK
            b_g = load(p_g, first, count, BLOCK, EDGE)
            b_to_l = shared * b_g
            b_to_g = g_of_g * b_g
            if p_u is not None:
                b_u = load(p_u, first, count, BLOCK, EDGE)
                b_to_l += l_of_u * b_u
                b_to_g += g_of_u * b_u
            if p_to_g is not None:
                b_to_g += shared * load_sum(p_l, p_c, first, count, BLOCK, EDGE)
                store(p_to_g, b_to_g, first, count, BLOCK, EDGE)
            if p_a is not None:
                b_to_l += load(p_a, first, count, BLOCK, EDGE)
            if p_to_l is not None:
                store(p_to_l, b_to_l, first, count, BLOCK, EDGE)
            if p_to_c is not None:
                store(p_to_c, b_to_l, first, count, BLOCK, EDGE)


@triton.jit(do_not_specialize=["chunks", "sequences", "max_norm"])
def of_rate(p_partial, p_sum, max_norm, sequences, chunks, SECOND: tl.constexpr, PARTS: tl.constexpr):
    """lr's gradient, -sum of s <g, l>, or where SECOND its cotangent, the sum of k h a - s b; one program."""
    result = tl.cast(0.0, tl.float64)
    for i in tl.range(sequences):
        sequence = tl.cast(i, tl.int32)
        _, _, s, k = norm_scale(p_partial, max_norm, sequence, chunks, PARTS)
        h = total(p_partial, 1, sequence, chunks, PARTS)
        if SECOND:
            a = total(p_partial, 2, sequence, chunks, PARTS)
            result += k * h * a - s * total(p_partial, 3, sequence, chunks, PARTS)
        else:
            result -= s * h
    if p_sum.dtype.element_ty == tl.float64:
        tl.store(p_sum, result)
    else:
        tl.store(p_sum, narrow(result.to(tl.float32), p_sum.dtype.element_ty))
