"""Keys and values of earlier tokens as a sequence is read in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import TTTConfig


class FixedRows:
    """A `blocks.StaticCache` over (B, n, H, D): new rows go to `start`, and are seen with those from `first` on."""

    def __init__(self, keys: Tensor, values: Tensor, start: int, first: int = 0) -> None:
        self._keys, self._values, self._start, self._first = keys, values, start, first

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `engine.blocks.Cache`."""
        for mine, new in zip(self.rows(k.shape[1]), (k, v), strict=True):
            if mine.data_ptr() != new.data_ptr():
                mine.copy_(new)
        seen = slice(self._first, self._start + k.shape[1])
        return self._keys[:, seen], self._values[:, seen]

    def rows(self, tokens: int) -> tuple[Tensor, Tensor]:
        """See `engine.blocks.StaticCache`."""
        new = slice(self._start, self._start + tokens)
        return self._keys[:, new], self._values[:, new]


class RecordedCache:
    """Keys and values (B, n, H, D) of earlier tokens, and after one `extend` those of new ones; for graphs."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.past = [keys, values]
        self.own: list[Tensor] = []

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `engine.blocks.Cache`."""
        self.own = [k, v]
        keys, values = (torch.cat((past, new), 1) for past, new in zip(self.past, self.own, strict=True))
        return keys, values


class GrowingCache:
    """Keys and values of a sequence that is read in parts; those outside the window are dropped."""

    def __init__(self, window: int | None, keys: Tensor, values: Tensor) -> None:
        self._window = window
        self._past = (keys, values)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `engine.blocks.Cache`."""
        k, v = torch.cat((self._past[0], k), 1), torch.cat((self._past[1], v), 1)
        self._past = (last_rows([k], self._window), last_rows([v], self._window))
        return k, v


def no_rows(config: TTTConfig, like: Tensor) -> list[Tensor]:
    """Keys and values, block by block, of sequences (B, ...) of which nothing has been read."""
    shape = (len(like), 0, config.num_heads, config.head_dim)
    return [
        torch.empty(shape, dtype=config.torch_dtype, device=like.device) for _ in range(2 * config.num_layers)
    ]


def by_cache(rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every block, of tensors block by block (keys, values)."""
    return list(zip(rows[::2], rows[1::2], strict=True))


def limit(window: int | None, length: int) -> int:
    """Of so many tokens, how many may be seen by later ones."""
    return length if window is None else min(length, window - 1)


def last_rows(pieces: Sequence[Tensor], window: int | None) -> Tensor:
    """Of keys or values (B, n, H, D) in pieces those that later tokens may see."""
    chosen: list[Tensor] = []
    for piece in reversed(pieces):
        chosen.insert(0, piece)
        if window is not None and sum(t.shape[1] for t in chosen) >= window - 1:
            break
    whole = chosen[0] if len(chosen) == 1 else torch.cat(chosen, 1)
    return whole[:, whole.shape[1] - limit(window, whole.shape[1]) :]


def first_seen(start: int, window: int | None, known: int) -> int:
    """The first token that one at `start` may see, where `known` tokens before the first are: negative among those."""
    return -known if window is None else max(-known, start - window + 1)
