"""What is done to the logits of a block of the vocabulary in Triton: a program per row, a piece of it after the other.

`p_logits` (N, cols) may be what is written too: then nothing that another thread has yet to read is overwritten.
`first` is the block's first class, and ALIGNED whether cols is a multiple of 16.
"""

import triton
import triton.language as tl

from ttt_kernels.triton_values import INTERPRETED, narrow

_NONE = tl.constexpr(float("-inf"))


@triton.jit
def _length(cols, ALIGNED: tl.constexpr):
    """cols, such that the compiler sees what divides it, and makes accesses of 16 bytes."""
    if ALIGNED:
        return cols // 16 * 16
    else:
        return cols


@triton.jit
def _load(p_row, start, cols, other, BLOCK: tl.constexpr):
    """A piece of a row in float32, `other` behind its end."""
    b_column = start + tl.arange(0, BLOCK)
    return tl.load(p_row + b_column, mask=b_column < cols, other=other).to(tl.float32)


@triton.jit
def _store(p_row, b_x, start, cols, BLOCK: tl.constexpr):
    b_column = start + tl.arange(0, BLOCK)
    tl.store(p_row + b_column, narrow(b_x, p_row.dtype.element_ty), mask=b_column < cols)


@triton.jit
def _own_place(p_own, row, first, cols):
    """The place of a row's target in the block, or -1."""
    place = tl.load(p_own + row) - first
    return tl.where((place >= 0) & (place < cols), place, -1).to(tl.int32)


@triton.jit
def _at(p_row, own):
    """The value at the target's place, -inf where that is elsewhere. All threads have it before one overwrites it."""
    value = tl.load(p_row + own, mask=own >= 0, other=_NONE).to(tl.float32)
    if not INTERPRETED:
        tl.debug_barrier()
    return value


@triton.jit
def _exp_less_one(x):
    """e^x - 1 of a number, by its series where the difference would cancel."""
    series = 1.0 + x / 8
    for i in tl.static_range(6):
        series = 1.0 + x / (7 - i) * series
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1)


@triton.jit
def _d_logits(b_x, at, own, lse, d, start, BLOCK: tl.constexpr):
    """A piece of d (P - Y), given the logits and that of the target."""
    b_dl = d * tl.exp(b_x - lse)
    return tl.where(start + tl.arange(0, BLOCK) == own, d * _exp_less_one(at - lse), b_dl)


@triton.jit(do_not_specialize=["first", "cols"])
def online(
    p_logits, p_factor, p_own, p_max, p_sum, p_others, p_picked, p_acc, first, cols, width,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates a row's statistics; with p_acc, which has the row's sums of `width`, the factor is written."""
    row = tl.program_id(0).to(tl.int64)
    cols = _length(cols, ALIGNED)
    p_row = p_logits + row * cols
    own = _own_place(p_own, row, first, cols)
    at = _at(p_row, own)
    tl.store(p_picked + row, at, mask=own >= 0)
    b_max = tl.full((BLOCK,), _NONE, tl.float32)
    for start in tl.range(0, cols, BLOCK):
        b_max = tl.maximum(b_max, _load(p_row, start, cols, _NONE, BLOCK))
    before = tl.load(p_max + row)
    top = tl.maximum(before, tl.max(b_max, 0))
    # A row of which all logits so far are -inf has nothing to be relative to.
    zero = tl.where(top == _NONE, 0.0, top)
    decay = tl.exp(before - zero)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, cols, BLOCK):
        b_p = tl.exp(_load(p_row, start, cols, _NONE, BLOCK) - zero)
        # Left out of the sum and not subtracted from it, where its rounding would remain.
        b_p = tl.where(start + tl.arange(0, BLOCK) == own, 0.0, b_p)
        b_sum += b_p
        if p_acc is not None:
            _store(p_factor + row * cols, b_p, start, cols, BLOCK)
    others = tl.sum(b_sum, 0)
    tl.store(p_max + row, top)
    tl.store(p_sum + row, tl.load(p_sum + row) * decay + (others + tl.exp(at - zero)))
    tl.store(p_others + row, tl.load(p_others + row) * decay + others)
    if p_acc is not None:
        p_sums = p_acc + row * width
        # Before the first block nothing has been summed.
        if (decay < 1) & (before > _NONE):
            for start in tl.range(0, width, BLOCK):
                _store(p_sums, _load(p_sums, start, width, 0.0, BLOCK) * decay, start, width, BLOCK)


@triton.jit(do_not_specialize=["first", "cols"])
def d_logits(p_logits, p_factor, p_own, p_lse, p_d, first, cols, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """dl = d (P - Y)."""
    row = tl.program_id(0).to(tl.int64)
    cols = _length(cols, ALIGNED)
    p_row = p_logits + row * cols
    own = _own_place(p_own, row, first, cols)
    at = _at(p_row, own)
    lse = tl.load(p_lse + row)
    d = tl.load(p_d + row)
    for start in tl.range(0, cols, BLOCK):
        b_dl = _d_logits(_load(p_row, start, cols, _NONE, BLOCK), at, own, lse, d, start, BLOCK)
        _store(p_factor + row * cols, b_dl, start, cols, BLOCK)


@triton.jit(do_not_specialize=["first", "cols"])
def second(
    p_logits, p_along, p_factor, p_factor_along, p_own, p_lse, p_mean, p_d, first, cols,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dl, and q = d P (l^ - mean) as the factor of l^, which p_along is."""
    row = tl.program_id(0).to(tl.int64)
    cols = _length(cols, ALIGNED)
    p_row = p_logits + row * cols
    own = _own_place(p_own, row, first, cols)
    at = _at(p_row, own)
    lse = tl.load(p_lse + row)
    middle = tl.load(p_mean + row)
    d = tl.load(p_d + row)
    for start in tl.range(0, cols, BLOCK):
        b_x = _load(p_row, start, cols, _NONE, BLOCK)
        b_along = _load(p_along + row * cols, start, cols, 0.0, BLOCK)
        b_q = d * tl.exp(b_x - lse) * (b_along - middle)
        _store(p_factor_along + row * cols, b_q, start, cols, BLOCK)
        _store(p_factor + row * cols, _d_logits(b_x, at, own, lse, d, start, BLOCK), start, cols, BLOCK)
