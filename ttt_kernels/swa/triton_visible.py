"""Which tiles a block of attention visits: nothing outside the window, and masks only at its edges.

A query i sees the keys from `first_key(i)` to its own position i + Tk - Tq; neither falls along the queries. So
the keys that a block of queries sees are one range, in whose middle every query of the block sees every key, and the
queries that see a block of keys likewise. A range is (begin, full, full_end, left, edges, end): tiles from `full` to
`full_end` need no mask, and of the `edges` tiles that do, `left` begin at `begin` and the others at `full_end`.
"""

import triton
import triton.language as tl

from ttt_kernels.triton_values import INTERPRETED


@triton.jit
def query_block(heads, Tq, BQ: tl.constexpr):
    """Sequence, head and first query of this program; late queries, which see the most keys, first."""
    blocks = tl.cdiv(Tq, BQ)
    index = tl.program_id(0)
    head = index // blocks
    return head // heads, head % heads, (blocks - 1 - index % blocks) * BQ


@triton.jit
def key_block(kv_heads, first, end, BK: tl.constexpr):
    """Sequence, head of keys and first key of this program, of the keys from `first` to `end`."""
    blocks = tl.cdiv(end - first, BK)
    index = tl.program_id(0)
    head = index // blocks
    return head // kv_heads, head % kv_heads, first + index % blocks * BK


@triton.jit
def lowest_key(p_lengths, sequence, Tk):
    """The first valid key of a sequence."""
    low = 0
    if p_lengths is not None:
        low = tl.maximum(Tk - tl.load(p_lengths + sequence).to(tl.int32), 0)
    return low


@triton.jit
def first_key(b_i, p_first, low, Tq, Tk, window):
    """The first key that queries see; `p_first` holds it for packed sequences."""
    b_first = tl.maximum(b_i + (Tk - Tq + 1) - window, low)
    if p_first is not None:
        b_first = tl.maximum(b_first, tl.load(p_first + b_i, mask=b_i < Tq, other=0))
    return b_first


@triton.jit
def _end_query(j, p_end, Tq, Tk, window):
    """One past the last query that sees key j; `p_end` holds it for packed sequences."""
    end = tl.minimum(j + window - (Tk - Tq), Tq)
    if p_end is not None:
        end = tl.minimum(end, tl.load(p_end + j))
    return end


@triton.jit
def _counted(begin, full, full_end, end, SIZE: tl.constexpr):
    """A range from its bounds."""
    left = tl.cdiv(full - begin, SIZE)
    return begin, full, full_end, left, left + tl.cdiv(end - full_end, SIZE), end


@triton.jit
def key_range(i, p_first, low, Tq, Tk, window, BQ: tl.constexpr, BK: tl.constexpr):
    """The range of the keys that the queries [i, i + BQ) see."""
    last = tl.minimum(i + BQ, Tq) - 1
    end = last + (Tk - Tq) + 1
    begin = tl.minimum(first_key(i, p_first, low, Tq, Tk, window) // BK * BK, end)
    full = tl.minimum(tl.cdiv(first_key(last, p_first, low, Tq, Tk, window), BK) * BK, end)
    full_end = tl.maximum((i + (Tk - Tq) + 1) // BK * BK, full)
    return _counted(begin, full, full_end, end, BK)


@triton.jit
def query_range(j, p_end, low, Tq, Tk, window, BQ: tl.constexpr, BK: tl.constexpr):
    """The range of the queries that see the keys [j, j + BK)."""
    last = tl.minimum(j + BK, Tk) - 1
    begin = tl.maximum(j - (Tk - Tq), 0) // BQ * BQ
    end = tl.maximum(_end_query(last, p_end, Tq, Tk, window), begin)
    end = tl.where(last < low, begin, end)
    full = tl.minimum(tl.cdiv(tl.maximum(last - (Tk - Tq), 0), BQ) * BQ, end)
    full_end = tl.maximum(_end_query(j, p_end, Tq, Tk, window) // BQ * BQ, full)
    full_end = tl.where(j < low, full, full_end)
    return _counted(begin, full, full_end, end, BQ)


@triton.jit
def before(span, cut, SIZE: tl.constexpr):
    """The tiles of a range before `cut`, a multiple of SIZE."""
    return _counted(
        tl.minimum(span[0], cut), tl.minimum(span[1], cut), tl.minimum(span[2], cut), tl.minimum(span[5], cut), SIZE
    )  # fmt: skip


@triton.jit
def behind(span, cut, SIZE: tl.constexpr):
    """The tiles of a range from `cut` on, a multiple of SIZE."""
    return _counted(
        tl.maximum(span[0], cut), tl.maximum(span[1], cut), tl.maximum(span[2], cut), tl.maximum(span[5], cut), SIZE
    )  # fmt: skip


@triton.jit
def tiles(span, SIZE: tl.constexpr, EDGE: tl.constexpr):
    """How many tiles at the edges of a range, or in its middle."""
    if EDGE:
        return span[4]
    return (span[2] - span[1]) // SIZE


@triton.jit
def tile_start(span, index, SIZE: tl.constexpr, EDGE: tl.constexpr):
    """Where a tile at the edges of a range, or in its middle, begins."""
    if EDGE:
        return tl.where(index < span[3], span[0] + index * SIZE, span[2] + (index - span[3]) * SIZE)
    return span[1] + index * SIZE


@triton.jit
def where_seen(b_x, LOW: tl.constexpr, b_i, b_j, p_first, low, Tq, Tk, window):
    """float32 b_x where queries see keys, elsewhere -inf where LOW or else 0.

    The indices have shapes such as (BQ, 1) and (1, BK).
    """
    # One comparison without sign says that a key is neither after the query nor before the first that it sees.
    b_first = first_key(b_i, p_first, low, Tq, Tk, window)
    b_count = tl.maximum(b_i + (Tk - Tq + 1) - b_first, 0)
    b_place = b_j - b_first
    if INTERPRETED:
        m_seen = b_place.to(tl.uint32, bitcast=True) < b_count.to(tl.uint32, bitcast=True)
        return tl.where(m_seen, b_x, float("-inf") if LOW else 0.0)
    # LLVM would collect comparisons of its own in numbers, bit by bit, and take them apart again for the choices.
    ASM: tl.constexpr = (
        "{ .reg .pred p; setp.lt.u32 p, $2, $3; selp.b32 $0, $1, 0xFF800000, p; }"
        if LOW
        else "{ .reg .pred p; setp.lt.u32 p, $2, $3; selp.b32 $0, $1, 0, p; }"
    )
    return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [b_x, b_place, b_count], tl.float32, True, 1)
