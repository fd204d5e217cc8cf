"""Tuples of tensors in the Triton kernels of clipped SGD: which piece of which tensor a program has.

Names in kernels: `p_` an address, `b_` the values of a block, `m_` a mask. A tuple of tensors, `t_`, is two: their
addresses and the strides of their sequences; `counts` are the elements of a sequence in each. The elements of all
tensors, one after the other, are divided into chunks of `steps` blocks, none of which has a part of two tensors.
"""

import triton
import triton.language as tl

from ttt_kernels.triton_values import narrow


@triton.jit
def chunk_of(counts, steps, chunk, BLOCK: tl.constexpr):
    """Of a chunk: the tensor's index, the first element, whole blocks, blocks in all, and the tensor's elements."""
    index = 0
    first = chunk * 0
    begin = chunk * 0
    count = tl.cast(counts[0], tl.int64)
    for i in tl.static_range(len(counts)):
        # A tensor without elements begins where the next does, which then takes its place.
        count = tl.where(chunk >= begin, tl.cast(counts[i], tl.int64), count)
        index = tl.where(chunk >= begin, i, index)
        first = tl.where(chunk >= begin, chunk - begin, first)
        begin += tl.cdiv(tl.cast(counts[i], tl.int64), tl.cast(steps, tl.int64) * BLOCK).to(tl.int32)
    start = first.to(tl.int64) * steps * BLOCK
    blocks = tl.minimum(tl.cdiv(count - start, BLOCK), steps).to(tl.int32)
    whole = tl.minimum((count - start) // BLOCK, steps).to(tl.int32)
    return index, start, whole, blocks, count


@triton.jit
def sequence_of(t, index, sequence):
    """The address of a sequence's elements in tensor `index`, None where tensors are missing."""
    if t is None:
        return
    else:
        p_x = t[0][0]
        stride = tl.cast(t[1][0], tl.int64)
        for i in tl.static_range(1, len(t[0])):
            p_x = tl.where(index == i, t[0][i], p_x)
            stride = tl.where(index == i, tl.cast(t[1][i], tl.int64), stride)
        return p_x + sequence.to(tl.int64) * stride


@triton.jit
def load(p_x, start, count, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Elements [start, start + BLOCK) in float32, where EDGE zeros for those from `count` on."""
    b_element = start + tl.arange(0, BLOCK)
    if EDGE:
        return tl.load(p_x + b_element, mask=b_element < count, other=0.0).to(tl.float32)
    return tl.load(p_x + b_element).to(tl.float32)


@triton.jit
def load_sum(p_x, p_y, start, count, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Elements of two tensors, added and rounded to the first's dtype; those of the first where p_y is None."""
    b_x = load(p_x, start, count, BLOCK, EDGE)
    if p_y is not None:
        b_x += load(p_y, start, count, BLOCK, EDGE)
        b_x = narrow(b_x, p_x.dtype.element_ty).to(tl.float32)
    return b_x


@triton.jit
def store(p_x, b_x, start, count, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Stores elements in the tensor's dtype."""
    b_element = start + tl.arange(0, BLOCK)
    if EDGE:
        tl.store(p_x + b_element, narrow(b_x, p_x.dtype.element_ty), mask=b_element < count)
    else:
        tl.store(p_x + b_element, narrow(b_x, p_x.dtype.element_ty))
