"""Tokens that mean nothing, for trying a configuration out before its data are there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.data.store import Vocabulary, check_range, fingerprint_of

_BLOCK = 2**16


class RandomStore:
    """So many random tokens of a vocabulary, for each split others, the same in every process and every time."""

    def __init__(self, vocab_size: int, split: str, length: int) -> None:
        self.name = f"random tokens ({split})"
        self.length = length
        self.vocabulary = Vocabulary("random", vocab_size, None)
        self._seed = [vocab_size, *split.encode()]

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """See `TokenStore`."""
        check_range(self, start, stop)
        first = start // _BLOCK
        blocks = [self._block(index) for index in range(first, -(-stop // _BLOCK))]
        return np.concatenate(blocks)[start - first * _BLOCK : stop - first * _BLOCK]

    def fingerprint(self) -> str:
        """See `TokenStore`."""
        block = self._block(0)
        return fingerprint_of(block.dtype, (self.length,), block)

    def _block(self, index: int) -> NDArray[np.int64]:
        generator = np.random.default_rng([*self._seed, index])
        return generator.integers(self.vocabulary.size, size=_BLOCK, dtype=np.int64)
