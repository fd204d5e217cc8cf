"""Blocks of queries with the keys of their windows: what keeps the formulas' memory linear in the length.

In a block, tensors stand as (B, Hk, G n, D): the G heads that share a head of keys below each other, each
with the block's n queries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from ttt_kernels.matmul import mm

QUERIES = 256
"""Queries of a block; keys are taken in whole blocks of as many."""


@dataclass
class Block:
    """The queries [begin, end), the keys [first, last) that some of them see, and who sees whom."""

    begin: int
    end: int
    first: int
    last: int
    hidden: Tensor  # (B or 1, 1, G n, keys) bool


@dataclass
class Layout:
    """Moves tensors between (B, T, H, D) and a block's (B, Hk, G n, D)."""

    heads: int
    kv_heads: int
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def queries(self, t: Tensor, block: Block) -> Tensor:
        part = t[:, block.begin : block.end].unflatten(2, (self.kv_heads, -1))
        return part.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def statistic(self, t: Tensor, block: Block) -> Tensor:
        """(B, Hq, Tq) -> (B, Hk, G n, 1)."""
        return t[:, :, block.begin : block.end].unflatten(1, (self.kv_heads, -1)).flatten(2, 3)[..., None]

    def keys(self, t: Tensor, block: Block) -> Tensor:
        return t[:, block.first : block.last].transpose(1, 2)

    def join_queries(self, blocks: Sequence[Tensor]) -> Tensor:
        parts = [
            b.unflatten(2, (self.heads // self.kv_heads, -1)).flatten(1, 2).transpose(1, 2) for b in blocks
        ]
        return torch.cat(parts, 1).to(self.dtype).contiguous()

    def join_statistic(self, blocks: Sequence[Tensor]) -> Tensor:
        parts = [b.squeeze(-1).unflatten(2, (self.heads // self.kv_heads, -1)).flatten(1, 2) for b in blocks]
        return torch.cat(parts, 2).contiguous()

    def widen(self, t: Tensor) -> Tensor:
        return t.to(self.wide)

    @overload
    def product(self, a: Tensor, b: Tensor) -> Tensor: ...
    @overload
    def product(self, a: Tensor | None, b: Tensor | None) -> Tensor | None: ...
    def product(self, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        """a @ b in the inputs' dtype, as a wide tensor; None, which is zero, where a factor is."""
        if a is None or b is None:
            return None
        return mm(a.to(self.dtype), b.to(self.dtype), self.wide)


class KeySum:
    """Sums what blocks of queries contribute to the gradient of the keys from `start` on."""

    def __init__(self, keys: int, start: int) -> None:
        self.keys, self.start = keys, start
        self.parts: dict[int, Tensor] = {}

    def wanted(self, block: Block) -> slice:
        """The keys of a block whose gradient is summed: those from the whole block of `start` on."""
        return slice(max(self.start // QUERIES * QUERIES - block.first, 0), None)

    def add(self, block: Block, part: Tensor) -> None:
        """Adds (B, Hk, wanted keys of the block, D)."""
        first = block.first + self.wanted(block).start
        for at in range(first, block.last, QUERIES):
            piece = part[:, :, at - first : at - first + QUERIES]
            self.parts[at] = self.parts[at] + piece if at in self.parts else piece

    def total(self, like: Tensor) -> Tensor:
        """(B, Tk - start, Hk, D), zeros where nothing was added, in like's dtype."""
        b, _, h, d = like.shape
        pieces = []
        for at in range(self.start // QUERIES * QUERIES, self.keys, QUERIES):
            zeros = like.new_zeros((b, h, min(QUERIES, self.keys - at), d))
            piece = self.parts.get(at, zeros)[:, :, max(self.start - at, 0) :]
            pieces.append(piece.transpose(1, 2).to(like.dtype))
        return torch.cat(pieces, 1).contiguous() if pieces else like[:, :0]


def blocks(q: Tensor, k: Tensor, first: Tensor, window: int | None) -> Iterator[Block]:
    """The blocks of a call, given `visible.first_keys`; keys before every window are left out of a block."""
    tq, tk = q.shape[1], k.shape[1]
    for begin in range(0, max(tq, 1), QUERIES):
        end = min(begin + QUERIES, tq)
        lowest = 0 if window is None else max(0, tk - tq + begin - window + 1)
        low, high = lowest // QUERIES * QUERIES, min(-(-(tk - tq + end) // QUERIES) * QUERIES, tk)
        keys = torch.arange(low, high, device=q.device)
        own = torch.arange(tk - tq + begin, tk - tq + end, device=q.device)
        hidden = (keys < first[:, begin:end, None]) | (keys > own[:, None])
        yield Block(begin, end, low, high, hidden.repeat(1, q.shape[2] // k.shape[2], 1)[:, None])


def layout(q: Tensor, k: Tensor) -> Layout:
    """How tensors of these shapes stand in blocks."""
    return Layout(q.shape[2], k.shape[2], q.dtype)


def valid(t: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Keys or values with zeros where they are not valid: 0 times whatever is there must not be NaN."""
    if key_lengths is None:
        return t
    invalid = torch.arange(t.shape[1], device=t.device) < t.shape[1] - key_lengths[:, None]
    return t.masked_fill(invalid[:, :, None, None], 0)
