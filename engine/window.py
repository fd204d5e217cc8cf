"""Keys and values of the tokens that later queries may still see, in memory of a fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST_GROWTH = 1024


class Window:
    """One block's cache: (B, capacity, H, D) buffers whose valid rows end at `length`.

    With a window it never grows: rows that no later query can see are dropped when the buffer is full, by
    moving the others to its front. Without one (full attention) the buffer doubles.
    """

    def __init__(
        self, batch: int, heads: int, head_dim: int, keep: int | None, slack: int, like: Tensor
    ) -> None:
        """`keep`: rows before the newest that must survive (None: all); `slack`: rows between two moves."""
        self._keep = keep
        self._slack = slack
        rows = _FIRST_GROWTH if keep is None else keep + slack
        self.k = like.new_empty(batch, rows, heads, head_dim)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `engine.blocks.Cache`; the result is a view of the buffers."""
        start = self.add_rows(k.shape[1])
        self.k[:, start : self.length] = k
        self.v[:, start : self.length] = v
        return self.k[:, : self.length], self.v[:, : self.length]

    def add_rows(self, tokens: int) -> int:
        """Makes room for `tokens` new tokens; returns the first of their rows, for the caller to fill."""
        self._make_room(tokens)
        start, self.length = self.length, self.length + tokens
        return start

    def drop_last(self, tokens: int) -> None:
        """Takes the newest `tokens` tokens back."""
        self.length -= tokens

    def valid(self) -> tuple[Tensor, Tensor]:
        """The rows that later queries may still see."""
        start = 0 if self._keep is None else max(0, self.length - self._keep)
        return self.k[:, start : self.length], self.v[:, start : self.length]

    def copy_from(self, other: Window, pending: int) -> None:
        """Takes over the rows of another cache of the same kind that later queries may still see.

        `pending` of them belong to a mini-batch that is not over. It begins at a row that does not depend on how much
        was dropped before it, so that few distinct places are ever read and written.
        """
        k, v = other.valid()
        rows = k.shape[1]
        start = pending if rows == self._keep else 0
        self.length = start + rows
        for mine, theirs in ((self.k, k), (self.v, v)):
            # Nobody sees them, but products read them, and have to find numbers.
            mine[:, :start] = 0
            mine[:, start : self.length] = theirs

    def clone(self) -> Window:
        """An independent copy."""
        other = object.__new__(Window)
        other._keep, other._slack, other.length = self._keep, self._slack, self.length
        other.k, other.v = self.k.clone(), self.v.clone()
        return other

    def _make_room(self, tokens: int) -> None:
        rows = self.k.shape[1]
        if self.length + tokens <= rows:
            return
        k, v = self.valid()
        needed = k.shape[1] + tokens
        if needed > rows:
            # Full attention, or a slab longer than the slack: the latter happens once and stays bounded.
            rows = max(needed, 2 * rows) if self._keep is None else needed
            new_k = self.k.new_empty(self.k.shape[0], rows, *self.k.shape[2:])
            new_v = torch.empty_like(new_k)
        else:
            if 2 * k.shape[1] > self.length:
                # The rows to move overlap their destination.
                k, v = k.clone(), v.clone()
            new_k, new_v = self.k, self.v
        new_k[:, : k.shape[1]] = k
        new_v[:, : k.shape[1]] = v
        self.k, self.v, self.length = new_k, new_v, k.shape[1]
