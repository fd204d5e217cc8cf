"""A sequence in stretches: what is known at the start of each is kept, and each is read again on the way back.

That is the fast weights, and keys and values of the last window of every block: what is held beside it does not grow
with the length. The last stretch, where the way back starts, is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.caches import last_rows, limit, no_rows
from engine.config import TTTConfig
from engine.cotangents import RowCotangents, Totals, leaf, pulled
from engine.inner import by_block, flat
from engine.once import swept
from engine.stretch import Read, Reader
from engine.weights import Fast, Weights, mapped, tensors


def snapshot_bytes(config: TTTConfig, every: int) -> int:
    """What a stretch of `every` mini-batches of one sequence keeps for the way back."""
    d, i, length = config.hidden_size, config.intermediate_size, every * config.mini_batch_size
    master = torch.promote_types(config.torch_dtype, torch.float32)
    rows = 2 * config.num_layers * limit(config.window, length) * d
    return config.suffix_layers * 3 * d * i * master.itemsize + rows * config.torch_dtype.itemsize


def run(reader: Reader, weights: Weights, tokens: Tensor, masters: Fast, every: int) -> Read:
    """Reads tokens (B, T + 1) from their first on, `every` mini-batches at a time.

    `nll`, `fast` and `prefix_output` are differentiable once with respect to the weights and `masters`; a second time
    raises. There are no `rows`.
    """
    stretches = _Stretches(reader, weights, tokens, every, goes_back=torch.is_grad_enabled())
    nll, prefix_output, *final = swept(stretches, *tensors(weights), *flat(masters))
    return Read(nll, by_block(final), [], prefix_output, stretches.norms, stretches.inner_grads)


class _Recorded(NamedTuple):
    """A stretch as a graph, and the keys, values and fast weights that it starts from."""

    past: list[Tensor]
    masters: list[Tensor]
    read: Read


class _Stretches:
    def __init__(
        self, reader: Reader, weights: Weights, tokens: Tensor, every: int, *, goes_back: bool
    ) -> None:
        self._reader = reader
        self._dtypes = [t.dtype for t in tensors(weights)]
        self._weights = mapped(weights, leaf)
        self._tokens = tokens
        self._goes_back = goes_back
        self._size = every * reader.config.mini_batch_size
        length = tokens.shape[1] - 1
        self._parts = [
            slice(start, min(start + self._size, length)) for start in range(0, length, self._size)
        ]
        self._masters: list[Fast] = []
        self._rows: list[list[Tensor]] = []
        self._last: _Recorded | None = None
        self.norms: list[Tensor] = []
        self.inner_grads: list[Fast] = []

    @torch.no_grad()
    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """nll (B, T), the prefix blocks' outputs (B, T, d) and the last fast weights."""
        masters = by_block(given[len(self._dtypes) :])
        config, (batch, length) = self._reader.config, self._tokens.shape
        x = torch.empty(
            batch, length - 1, config.hidden_size, dtype=config.torch_dtype, device=self._tokens.device
        )
        nll = []
        for index, part in enumerate(self._parts):
            self._masters.append(masters)
            read = self._first_reading(index)
            self.norms += read.norms
            self.inner_grads += read.inner_grads
            if index + 1 < len(self._parts):
                # They are parts of larger tensors.
                self._rows.append([t.clone() for t in read.rows])
            nll.append(read.nll.detach())
            x[:, part] = read.prefix_output
            masters = by_block([t.detach() for t in flat(read.fast)])
        return torch.cat(nll, 1), x, *flat(masters)

    def backward(self, *cotangents: Tensor | None) -> list[Tensor | None]:
        """Cotangents of every slow weight and of the first fast weights."""
        d_nll, d_x, *d_final = cotangents
        totals = Totals(tensors(self._weights), self._dtypes)
        d_rows = RowCotangents(self._size)
        d_fast: Sequence[Tensor | None] = d_final
        for index in reversed(range(len(self._parts))):
            d_nll_, d_x_ = (None if d is None else d[:, self._parts[index]] for d in (d_nll, d_x))
            d_fast = self._back(index, d_nll_, d_x_, d_fast, d_rows, totals)
        return [*totals.found, *d_fast]

    def _back(
        self,
        index: int,
        d_nll: Tensor | None,
        d_x: Tensor | None,
        d_fast: Sequence[Tensor | None],
        d_rows: RowCotangents,
        totals: Totals,
    ) -> Sequence[Tensor | None]:
        """Takes stretch `index` back: cotangents of the fast weights before it; the others are summed up."""
        recorded, self._last = self._last or self._record(index), None
        read, (part, count) = recorded.read, (self._parts[index], len(recorded.past))
        unseen = part.stop - part.start - read.rows[0].shape[1]
        results = [
            # Something always has a cotangent.
            (read.nll, torch.zeros_like(read.nll) if d_nll is None else d_nll),
            (read.prefix_output, d_x),
            *zip(flat(read.fast), d_fast, strict=True),
            *zip(read.rows, d_rows.pop(index, read.rows, unseen), strict=True),
        ]
        found = pulled(results, [*recorded.past, *recorded.masters, *totals.leaves])
        d_rows.add(part.start - recorded.past[0].shape[1], found[:count])
        totals.add(found[count + len(d_fast) :])
        return found[count : count + len(d_fast)]

    def _first_reading(self, index: int) -> Read:
        if self._goes_back and index + 1 == len(self._parts):
            self._last = self._record(index)
            return self._last.read
        return self._read(index, self._past(index), self._masters[index])

    @torch.enable_grad()
    def _record(self, index: int) -> _Recorded:
        past = [leaf(t) for t in self._past(index)]
        masters = [leaf(t) for t in flat(self._masters.pop())]
        del self._rows[index:]
        return _Recorded(past, masters, self._read(index, past, by_block(masters)))

    def _read(self, index: int, past: list[Tensor], masters: Fast) -> Read:
        part = self._parts[index]
        return self._reader.read(
            self._weights, self._tokens[:, part.start : part.stop + 1], part.start, past, masters
        )

    def _past(self, index: int) -> list[Tensor]:
        """Keys and values that stretch `index` may see of those before, block by block."""
        config = self._reader.config
        nothing = no_rows(config, self._tokens)
        return [last_rows(pieces, config.window) for pieces in zip(nothing, *self._rows[:index], strict=True)]
