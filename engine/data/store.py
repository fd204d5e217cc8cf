"""What training reads: the tokens of one split as one long sequence."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray


@dataclass(frozen=True)
class Vocabulary:
    """What a store knows of the tokenizer that made its tokens."""

    tokenizer: str
    """`bytes`, `llama3`, or the file that holds it."""
    size: int
    """Tokens are from 0 to size - 1."""
    bos_token_id: int | None
    """Begins every document; None where nothing does."""


class TokenStore(Protocol):
    """The tokens of one split: one sequence, of which any part can be read."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def length(self) -> int:
        """Tokens in the split."""

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Of its tokens; None where the store does not say."""

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens `start` to `stop` - 1, int64 of shape (stop - start,).

        Raises `ValueError` where the split has no such tokens, or where they cannot be read.
        """

    def fingerprint(self) -> str:
        """16 hexadecimal digits, cheap to get, by which a run can tell that it would go on with other data."""


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The smallest of uint8, uint16 and int32 that holds every token of a vocabulary of `vocab_size`."""
    if vocab_size <= 2**8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if vocab_size <= 2**16 else np.dtype(np.int32)


def check_range(store: TokenStore, start: int, stop: int) -> None:
    """Raises `ValueError` unless the store has tokens `start` to `stop` - 1."""
    if not 0 <= start <= stop <= store.length:
        raise ValueError(
            f"{store.name}: cannot read tokens from {start} to {stop}; accepted is "
            f"0 <= start <= stop <= {store.length}"
        )


def fingerprint_of(dtype: DTypeLike, shape: tuple[int, ...], *tokens: NDArray[np.integer]) -> str:
    """The fingerprint of data of that dtype and shape, as far as it is told by some of its tokens."""
    digest = hashlib.blake2b(f"{np.dtype(dtype)} {shape}".encode(), digest_size=8)
    for part in tokens:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
