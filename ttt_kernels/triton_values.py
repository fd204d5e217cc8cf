"""Arithmetic of Triton kernels where the interpreter's differs from a GPU's."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels are interpreted on the processor (TRITON_INTERPRET=1)."""


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """float32 values rounded to the nearest of `dtype`."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter of Triton 3.6 to 3.9 cuts the low half off instead.
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_rounded = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        # The carry of a NaN's bits would make another number of it.
        b_rounded = tl.where(b_x != b_x, 0x7FC0, b_rounded)
        return b_rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return b_x.to(dtype)


@triton.jit
def dot(b_x, b_y, b_sum):
    """b_sum + b_x @ b_y in float32, never tf32."""
    if INTERPRETED:
        # The interpreter multiplies the bits of bfloat16 as integers.
        b_x = b_x.to(tl.float32)
        b_y = b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_sum, input_precision="ieee")
