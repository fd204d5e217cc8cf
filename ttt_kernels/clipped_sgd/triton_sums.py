"""Inner products over tuples of tensors, and what the factors of clipped SGD are made of; all in float64."""

import triton
import triton.language as tl

from ttt_kernels.clipped_sgd.triton_tuples import chunk_of, load, load_sum, sequence_of


@triton.constexpr_function
def _is_address(kind):
    """Whether an argument of this type is in memory."""
    return kind.is_ptr()


@triton.jit
def number(x):
    """A float64 number from its address, or from its bits: arguments that are numbers have 32 bits; None is 0."""
    if x is None:
        return tl.cast(0.0, tl.float64)
    elif _is_address(x.dtype):
        return tl.load(x).to(tl.float64)
    else:
        return tl.cast(x, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _store_sum(p_partial, which, b_sum, chunks):
    row = (tl.program_id(0) // chunks).to(tl.int64) * 4 + which
    tl.store(p_partial + row * chunks + tl.program_id(0) % chunks, tl.sum(b_sum, 0))


@triton.jit(do_not_specialize=["steps", "chunks"])
def products(t_g, t_l, t_c, t_u, p_partial, counts, steps, chunks, BLOCK: tl.constexpr):
    """Each chunk's part (B, 4, chunks) of <g, g>, <g, l>, <g, u> and <l, u>, l being rounded l + c."""
    index, start, whole, blocks, count = chunk_of(counts, steps, tl.program_id(0) % chunks, BLOCK)
    sequence = tl.program_id(0) // chunks
    p_g = sequence_of(t_g, index, sequence)
    p_l = sequence_of(t_l, index, sequence)
    p_c = sequence_of(t_c, index, sequence)
    p_u = sequence_of(t_u, index, sequence)
    b_gg = tl.zeros((BLOCK,), tl.float64)
    b_gl = tl.zeros((BLOCK,), tl.float64)
    b_gu = tl.zeros((BLOCK,), tl.float64)
    b_lu = tl.zeros((BLOCK,), tl.float64)
    for EDGE in tl.static_range(2):
        for step in tl.range(whole if EDGE else 0, blocks if EDGE else whole):
            first = start + tl.cast(step, tl.int64) * BLOCK
            b_g = load(p_g, first, count, BLOCK, EDGE).to(tl.float64)
            b_gg += b_g * b_g
            if p_l is not None:
                b_l = load_sum(p_l, p_c, first, count, BLOCK, EDGE).to(tl.float64)
                b_gl += b_g * b_l
            if p_u is not None:
                b_u = load(p_u, first, count, BLOCK, EDGE).to(tl.float64)
                b_gu += b_g * b_u
                if p_l is not None:
                    b_lu += b_l * b_u
    _store_sum(p_partial, 0, b_gg, chunks)
    if p_l is not None:
        _store_sum(p_partial, 1, b_gl, chunks)
    if p_u is not None:
        _store_sum(p_partial, 2, b_gu, chunks)
        if p_l is not None:
            _store_sum(p_partial, 3, b_lu, chunks)


@triton.jit
def total(p_partial, which, sequence, chunks, PARTS: tl.constexpr):
    """A product of a sequence from its chunks' parts."""
    b_sum = tl.zeros((PARTS,), tl.float64)
    p_row = p_partial + (sequence.to(tl.int64) * 4 + which) * chunks
    for first in tl.range(0, chunks, PARTS):
        b_part = first + tl.arange(0, PARTS)
        b_sum += tl.load(p_row + b_part, mask=b_part < chunks, other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit
def norm_scale(p_partial, max_norm, sequence, chunks, PARTS: tl.constexpr):
    """n, 1 / n (0 at n = 0), the factor s, and s / n^2 where it clips, else 0.

    A NaN norm counts as clipped, so that it shows in every weight.
    """
    norm = tl.sqrt(total(p_partial, 0, sequence, chunks, PARTS))
    inverse = tl.where(norm == 0.0, 0.0, 1.0 / tl.where(norm == 0.0, 1.0, norm))
    one, zero = tl.cast(1.0, tl.float64), tl.cast(0.0, tl.float64)
    if max_norm is None:
        return norm, inverse, one, zero
    else:
        threshold = number(max_norm)
        scale = tl.where(norm < threshold, one, threshold / tl.where(norm < threshold, one, norm))
        return norm, inverse, scale, tl.where(norm < threshold, zero, scale * inverse * inverse)
