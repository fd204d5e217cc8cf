"""Batches of sequences: which ones step n reads follows from n, the seed and the data, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from engine.data.store import TokenStore


class Sequences:
    """A store cut into sequences of T = `seq_length` inputs and the target that follows the last of them.

    Sequence i is the T + 1 tokens from i * T on, so that it shares one token with the next. Raises `ValueError`
    where the store is too short for one.
    """

    def __init__(self, store: TokenStore, seq_length: int) -> None:
        if seq_length < 1:
            raise ValueError(f"seq_length={seq_length} is not accepted: it must be at least 1")
        if store.length <= seq_length:
            raise ValueError(
                f"seq_length={seq_length} is not accepted: a sequence needs {seq_length + 1} tokens and "
                f"{store.name} has {store.length}"
            )
        self.store = store
        self.seq_length = seq_length

    def __len__(self) -> int:
        return (self.store.length - 1) // self.seq_length

    def read(self, indices: Iterable[int]) -> torch.Tensor:
        """These sequences, int64 of shape (B, T + 1). Raises `ValueError` for an index that there is not."""
        return torch.from_numpy(np.stack([self._read(index) for index in indices]))

    def _read(self, index: int) -> NDArray[np.int64]:
        if not 0 <= index < len(self):
            raise ValueError(f"index={index} is not accepted: {self.store.name} has {len(self)} sequences")
        start = index * self.seq_length
        return self.store.read(start, start + self.seq_length + 1)


class Batches:
    """Shuffled batches without end; each epoch is a new order, of which a last, smaller batch is left out.

    Raises `ValueError` where there are fewer sequences than `batch_size`.
    """

    def __init__(self, sequences: Sequences, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= len(sequences):
            raise ValueError(
                f"batch_size={batch_size} is not accepted: it must be from 1 to {len(sequences)}, the sequences "
                f"of {sequences.seq_length} tokens in {sequences.store.name}"
            )
        if seed < 0:
            raise ValueError(f"seed={seed} is not accepted: it must be at least 0")
        self.sequences = sequences
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = len(sequences) // batch_size
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def indices(self, step: int) -> list[int]:
        """The sequences of the whole batch of step `step`, from 0 on."""
        if step < 0:
            raise ValueError(f"step={step} is not accepted: it must be at least 0")
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._order_of(epoch)
        return [int(i) for i in order[place * self.batch_size : (place + 1) * self.batch_size]]

    def batch(self, step: int, rows: slice | None = None) -> torch.Tensor:
        """The batch of step `step`, int64 of shape (B, T + 1).

        With `rows` only those of the batch, which are what one process of several works on; the others are not
        read. Raises `ValueError` where that leaves none.
        """
        chosen = self.indices(step)[slice(None) if rows is None else rows]
        if not chosen:
            raise ValueError(f"rows={rows} is not accepted: it takes nothing of a batch of {self.batch_size}")
        return self.sequences.read(chosen)

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
            self._order = (epoch, np.random.Generator(bits).permutation(len(self.sequences)))
        return self._order[1]


def in_order(sequences: Sequences, batch_size: int) -> Iterator[torch.Tensor]:
    """Every sequence once, in order: batches (B, T + 1) of int64, of which the last may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not accepted: it must be at least 1")
    for start in range(0, len(sequences), batch_size):
        yield sequences.read(range(start, min(start + batch_size, len(sequences))))
