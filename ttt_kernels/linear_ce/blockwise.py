"""Cross-entropy of a linear layer on kernels: its products, one block of the vocabulary after the other.

Products are torch's BLAS; what is done to the logits of a block is a backend's passes. Letters are those of
`reference`, and g is the slope, the gradient of a loss with respect to its row of x.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ttt_kernels.extension import compute_dtype
from ttt_kernels.linear_ce import targets
from ttt_kernels.linear_ce.blocks import block_size, blocks
from ttt_kernels.matmul import accumulate, multiply_into, operand

Optional = Tensor | None


class Block:
    """One block of the vocabulary.

    Attributes:
        part: its classes.
        weight: (cols, d) the block's weights as products read them.
        logits: (N, cols) contiguous.
        factor: (N, cols) contiguous, in the products' type: where passes put what is multiplied next. It may be
            the same memory as `logits`. Both are overwritten by the next block.
    """

    def __init__(self, part: slice, weight: Tensor, logits: Tensor, factor: Tensor) -> None:
        self.part, self.weight, self.logits, self.factor = part, weight, logits, factor


class Passes(Protocol):
    """What a backend does to the logits of a block. `own` (N,) is a row's target, or -1."""

    def online(
        self,
        block: Block,
        own: Tensor,
        maximum: Tensor,
        sums: Tensor,
        others: Tensor,
        picked: Tensor,
        acc: Optional,
    ) -> None:
        """Updates each row's maximum, its sum of e^(l - maximum), that sum without the target, and l_t.

        With acc (N, d), which is scaled as the maximum grows, the block's factor becomes e^(l - maximum), and 0
        at the target.
        """
        ...

    def d_logits(self, block: Block, own: Tensor, lse: Tensor, d: Tensor) -> None:
        """The block's factor becomes dl = d (P - Y)."""
        ...

    def second(self, block: Block, along: Block, own: Tensor, lse: Tensor, mean: Tensor, d: Tensor) -> None:
        """The block's factor becomes dl, and that of along, whose logits are l^, becomes q = d P (l^ - mean)."""
        ...


class _Memory:
    """Memory for blocks, reused by all of a sweep: for one at a time, or for `many` of the same classes."""

    def __init__(self, x: Tensor, weight: Tensor, many: int = 1) -> None:
        self.x, self.weight, self._many = operand(x), weight, many
        self.dtype = x.dtype
        size = block_size(x.shape[0], weight.shape[0], x.device)
        # On a GPU products of 16-bit factors have float32 results; on a processor they have the factors' type.
        wide = compute_dtype(x.dtype) if x.is_cuda else self.x.dtype
        self.logits = x.new_empty(many * x.shape[0] * size, dtype=wide)
        same = wide == self.x.dtype
        self.factors = self.logits if same else x.new_empty(self.logits.shape, dtype=self.x.dtype)
        as_is = weight.dtype == x.dtype == self.x.dtype
        self.converted = None if as_is else self.x.new_empty(many, size, x.shape[1])

    def weights(self, weight: Tensor, part: slice, index: int = 0) -> Tensor:
        """A block of weights, or of what has their shape, as products read it."""
        if self.converted is None:
            return weight[part]
        rows = weight[part]
        # Rounded first to x's type, where products have a wider one.
        rows = rows if self.converted.dtype == self.dtype else rows.to(self.dtype)
        return self.converted[index, : part.stop - part.start].copy_(rows)

    def block(self, part: slice, weight: Tensor, index: int = 0) -> Block:
        """A block whose logits are yet to be computed."""
        logits, factors = (self._all(part, t)[index] for t in (self.logits, self.factors))
        return Block(part, weight, logits, factors)

    def all_factors(self, part: slice) -> Tensor:
        """The factors of all blocks of the same classes, (many N, cols), those of each below those before."""
        return self._all(part, self.factors).flatten(0, 1)

    def _all(self, part: slice, memory: Tensor) -> Tensor:
        shape = (self._many, self.x.shape[0], part.stop - part.start)
        return memory[: math.prod(shape)].view(shape)


def _logits(memory: _Memory) -> Iterator[Block]:
    """Every block with its logits."""
    for part in blocks(memory.x.shape[0], memory.weight.shape[0], memory.x.device):
        block = memory.block(part, memory.weights(memory.weight, part))
        multiply_into(block.logits, memory.x, block.weight.t())
        yield block


def _tangents(memory: _Memory, like: Block, a: Optional, of_b: Optional) -> Block:
    """The block of l^ = a W^T + x b^T, given the block of the logits and b's: the second of `memory`."""
    along = memory.block(like.part, like.weight, 1)
    if of_b is None:
        assert a is not None
        multiply_into(along.logits, a, like.weight.t())
        return along
    multiply_into(along.logits, memory.x, of_b.t())
    if a is not None:
        accumulate(along.logits, a, like.weight.t())
    return along


def _own(target: Tensor, classes: int) -> Tensor:
    """The targets, and -1 for what is no class."""
    return torch.where(targets.outside(target, classes), -1, target)


def _own_rows(weight: Tensor, own: Tensor, x: Tensor) -> Tensor:
    """(N, d) the targets' weights, rounded as products read them, in the type computed in."""
    return weight[own.clamp(min=0)].to(x.dtype).to(compute_dtype(x.dtype))


def forward(
    passes: Passes, x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, keep_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`, in one sweep over the vocabulary: with the slope, two products per block.

    Until a row's last block its probabilities are known up to a factor, so acc, the sum of e^(l - maximum) W over the
    classes but the target, is kept for the largest logit so far; and g = (acc - W_t sum of e^(l - maximum)) / Z.
    """
    if not x.is_cuda:
        # On a GPU it would wait for the result.
        targets.check(target, weight.shape[0], ignore_index)
    wide = compute_dtype(x.dtype)
    own = _own(target, weight.shape[0])
    maximum = x.new_full(target.shape, -torch.inf, dtype=wide)
    sums, others, picked = (torch.zeros_like(maximum) for _ in range(3))
    acc = x.new_zeros(x.shape, dtype=wide) if keep_slope else None
    for block in _logits(_Memory(x, weight)):
        passes.online(block, own, maximum, sums, others, picked, acc)
        if acc is not None:
            accumulate(acc, block.factor, block.weight)
    # A target that nobody could check and that is no class shows in all that is made of its row.
    sums.masked_fill_((own < 0) & (target != ignore_index), torch.nan)
    log = sums.log()
    # Two small terms: lse - picked would round at the size of the logits.
    nll = (maximum - picked + log).masked_fill(target == ignore_index, 0)
    if acc is None:
        return nll, maximum + log, x.new_empty(0, dtype=wide)
    slope = acc.sub_(_own_rows(weight, own, x).mul_(others[:, None])).div_(sums[:, None])
    return nll, maximum + log, slope.masked_fill_((target == ignore_index)[:, None], 0)


def backward(
    passes: Passes,
    d_nll: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    slope: Tensor,
    ignore_index: int,
    keep_slope: bool,
    needs: Sequence[bool],
) -> tuple[Optional, Optional]:
    """As `reference.backward`; dx costs no product, and for dW the logits are computed once more."""
    d = d_nll.masked_fill(target == ignore_index, 0).contiguous()
    dx = (d[:, None] * slope).to(x.dtype) if needs[0] else None
    if not needs[1]:
        return dx, None
    own, lse = _own(target, weight.shape[0]), lse.contiguous()
    memory, dw = _Memory(x, weight), weight.new_empty(weight.shape)
    for block in _logits(memory):
        passes.d_logits(block, own, lse, d)
        _product_rows(dw, block.part, block.factor, memory.x)
    return dx, dw


def double_backward(
    passes: Passes,
    g_x: Optional,
    g_weight: Optional,
    d_nll: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    slope: Tensor,
    ignore_index: int,
    keep_slope: bool,
    needs: Sequence[bool],
) -> tuple[Optional, Optional, Optional]:
    """As `reference.double_backward`.

    With t = (P - Y) b, the change of g that b makes through the last product, r - l^_t is a . g + x . t, and what
    dl b adds to x's cotangent is d t. So with b a first sweep has two products, x W^T and t, and the second has no
    dl b.
    """
    likes = zip((d_nll, x, weight), needs, strict=True)
    if g_x is None and g_weight is None:
        to_d_nll, to_x, to_weight = (t.new_zeros(t.shape) if need else None for t, need in likes)
        return to_d_nll, to_x, to_weight
    wide, ignored = compute_dtype(x.dtype), target == ignore_index
    own, lse = _own(target, weight.shape[0]), lse.contiguous()
    d = d_nll.masked_fill(ignored, 0).contiguous()
    memory = _Memory(x, weight, 2)
    a = None if g_x is None else operand(g_x)
    rise = x.new_zeros(target.shape, dtype=wide)
    at_own = torch.zeros_like(rise)
    turn = None
    if g_weight is not None:
        turn, one = x.new_zeros(x.shape, dtype=wide), torch.ones_like(d)
        for block in _logits(memory):
            passes.d_logits(block, own, lse, one)
            accumulate(turn, block.factor, memory.weights(g_weight, block.part, 1))
        of_x = memory.x.to(wide)
        rise = rise + (of_x * turn).sum(1)
        at_own = at_own + (of_x * _own_rows(g_weight, own, x)).sum(1)
    if g_x is not None:
        of_a = g_x.to(wide)
        rise = rise + (of_a * slope).sum(1)
        at_own = at_own + (of_a * _own_rows(weight, own, x)).sum(1)
    to_d_nll = rise.masked_fill(ignored, 0) if needs[0] else None
    if not any(needs[1:]):
        return to_d_nll, None, None

    to_x = None
    if needs[1]:
        to_x = x.new_zeros(x.shape, dtype=wide) if turn is None else turn.mul_(d[:, None])
    to_weight = weight.new_empty(weight.shape) if needs[2] else None
    rows = _Rows(own, lse, rise + at_own, d)
    right = _right(memory, a)
    for block in _logits(memory):
        of_b = None if g_weight is None else memory.weights(g_weight, block.part, 1)
        along = _tangents(memory, block, a, of_b)
        _second_products(passes, memory, block, along, rows, to_x, to_weight, right)
    return to_d_nll, None if to_x is None else to_x.to(x.dtype), to_weight


def slope_forward(
    passes: Passes,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    known: Sequence[Tensor],
    ignore_index: int,
    of_slope: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.slope_forward`."""
    if known:
        nll, slope, lse = (t.clone() for t in known)
        return nll, slope, lse
    nll, lse, slope = forward(passes, x, weight, target, ignore_index, True)
    return nll, slope, lse


def slope_backward(
    passes: Passes,
    d_nll: Tensor,
    d_slope: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    known: Sequence[Tensor],
    slope: Tensor,
    lse: Tensor,
    ignore_index: int,
    of_slope: bool,
    needs: Sequence[bool],
) -> tuple[Optional, Optional]:
    """As `reference.slope_backward`, with five products: logits, their tangent, x's cotangent and two of W's.

    With c for d_nll and a for d_slope, what c adds to x's cotangent is c g, and what it adds to W's is
    (P - Y)^T c x, which is part of the product (P - Y)^T (a + c x).
    """
    if not of_slope:
        return backward(passes, d_nll, x, weight, target, lse, slope, ignore_index, True, needs)
    wide = compute_dtype(x.dtype)
    own, lse = _own(target, weight.shape[0]), lse.contiguous()
    counts = (target != ignore_index).to(wide)
    of_a, of_c = d_slope.to(wide), (d_nll.to(wide) * counts)[:, None]
    mean = (of_a * (slope + _own_rows(weight, own, x))).sum(1)
    a = operand(d_slope.to(x.dtype))
    beside = operand((of_a + of_c * x).to(x.dtype)) if needs[1] else None
    to_x = of_c * slope if needs[0] else None
    to_weight = weight.new_empty(weight.shape) if needs[1] else None
    rows, memory = _Rows(own, lse, mean, counts), _Memory(x, weight, 2)
    right = _right(memory, beside)
    for block in _logits(memory):
        along = _tangents(memory, block, a, None)
        _second_products(passes, memory, block, along, rows, to_x, to_weight, right)
    return None if to_x is None else to_x.to(x.dtype), to_weight


class _Rows(NamedTuple):
    """What a pass of the second order needs of every row, (N,) each; see `Passes.second`."""

    own: Tensor
    lse: Tensor
    mean: Tensor
    d: Tensor


def _right(memory: _Memory, beside: Optional) -> Tensor:
    """What the factors of two blocks are multiplied with for W: (2 N, d), or x alone where dl has nothing beside it.

    One product instead of a sum of two, of which nothing is rounded or read again in between.
    """
    return memory.x if beside is None else torch.cat((beside, memory.x))


def _second_products(
    passes: Passes,
    memory: _Memory,
    block: Block,
    along: Block,
    rows: _Rows,
    to_x: Optional,
    to_weight: Optional,
    right: Tensor,
) -> None:
    """Adds a block's q W to `to_x`, and writes its rows of dl^T beside + q^T x to `to_weight`; see `_right`."""
    passes.second(block, along, *rows)
    if to_x is not None:
        accumulate(to_x, along.factor, block.weight)
    if to_weight is not None:
        both = len(right) > len(memory.x)
        left = memory.all_factors(block.part) if both else along.factor
        _product_rows(to_weight, block.part, left, right)


def _product_rows(out: Tensor, part: slice, left: Tensor, right: Tensor) -> None:
    """out[part] = left^T right of operands, rounded once to out's type."""
    rows = out[part]
    wide = compute_dtype(right.dtype) if right.is_cuda else right.dtype
    direct = rows.dtype == wide or right.is_cuda
    total = rows if direct else right.new_empty(rows.shape, dtype=wide)
    multiply_into(total, left.t(), right)
    if not direct:
        rows.copy_(total)
