"""Cosines and sines of positions in Triton kernels, as exact as float32 is however far out a position is, and turns."""

import triton
import triton.language as tl


@triton.jit
def cos_sin(b_quarters):
    """cos and sin, float32, of angles in quarter turns, float64.

    In float64 what lies beyond the nearest whole quarter is exact, and an eighth of a turn is as far as the
    polynomials go: their truncation is below half a unit in the last place.
    """
    b_nearest = tl.floor(b_quarters + 0.5)
    b_x = ((b_quarters - b_nearest) * 1.5707963267948966).to(tl.float32)
    b_square = b_x * b_x
    b_sin = -1.9515295891e-4 * b_square + 8.3321608736e-3
    b_sin = b_sin * b_square - 1.6666654611e-1
    b_sin = b_sin * b_square * b_x + b_x
    b_cos = 2.443315711809948e-5 * b_square - 1.388731625493765e-3
    b_cos = b_cos * b_square + 4.166664568298827e-2
    b_cos = b_cos * b_square * b_square - 0.5 * b_square + 1.0
    b_quarter = b_nearest.to(tl.int64) & 3
    m_odd = (b_quarter & 1) == 1
    b_first = tl.where(m_odd, b_sin, b_cos)
    b_second = tl.where(m_odd, b_cos, b_sin)
    b_first = tl.where((b_quarter == 1) | (b_quarter == 2), -b_first, b_first)
    return b_first, tl.where(b_quarter >= 2, -b_second, b_second)


@triton.jit
def angles(b_position, STEP: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin (POSITIONS, PAIRS) of what positions turn pairs by: pair i by 2^(i STEP) radians a position.

    STEP is constant because as an argument it would be rounded to float32.
    """
    b_quarters = tl.exp2(tl.arange(0, PAIRS).to(tl.float64) * STEP) * 0.6366197723675814
    return cos_sin(b_position.to(tl.float64)[:, None] * b_quarters[None, :])


@triton.jit
def turned(b_x, b_cos, b_sin, POSITIONS: tl.constexpr, PAIRS: tl.constexpr):
    """Heads (POSITIONS, 2 PAIRS) in float32, their interleaved pairs turned."""
    b_even, b_odd = tl.split(tl.reshape(b_x, (POSITIONS, PAIRS, 2)))
    return tl.interleave(b_even * b_cos - b_odd * b_sin, b_odd * b_cos + b_even * b_sin)


@triton.jit
def rows_of_head(b_t, T, head, H: tl.constexpr):
    """The mask (POSITIONS, 1) of the positions of a head, none where there is no such head."""
    return (b_t < tl.where(head < H, T, 0))[:, None]
