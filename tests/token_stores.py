"""Small zarr stores, and ways to damage them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from engine.data import Vocabulary, write_token_store

VOCABULARY = Vocabulary("tokenizer.json", 1000, 7)
CHUNK = 100
TOKENS = np.random.default_rng(0).integers(0, 1000, 950)


def write(path: Path, tokens: NDArray[np.integer] = TOKENS) -> Path:
    """A store of our own with the split train, ten chunks of which the last is half full."""
    write_token_store(path, {"train": [tokens]}, VOCABULARY, chunk_tokens=CHUNK)
    return path


def write_with_zarr(path: Path, tokens: NDArray[Any] = TOKENS, **settings: Any) -> Path:
    """A store as other programs write it: by zarr alone, without attributes."""
    array = zarr.create_array(
        path,
        name="train",
        shape=tokens.shape,
        dtype=tokens.dtype,
        **{"chunks": (CHUNK,) * tokens.ndim, "config": {"write_empty_chunks": True}} | settings,
    )
    array[...] = tokens
    return path


def parts(tokens: NDArray[np.integer], cuts: list[int]) -> list[NDArray[np.integer]]:
    """`tokens` cut at these places, in any order and more than once too."""
    ends = [0, *sorted(cuts), len(tokens)]
    return [tokens[start:stop] for start, stop in itertools.pairwise(ends)]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and what is in it."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
