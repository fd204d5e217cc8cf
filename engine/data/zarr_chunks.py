"""Which chunks of a zarr array are there: zarr itself reads zeros where one is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.shard_index import ShardIndex


class ChunkFiles:
    """The files of a one-dimensional zarr array in `folder`, each a chunk or a shard of several chunks.

    Raises `ValueError` on opening, where a file is missing or shards cannot be checked; it names the array (by
    `name`), the file and the tokens that it would hold.
    """

    def __init__(self, name: str, folder: Path, array: Any) -> None:
        self.name = name
        self.folder = folder
        self.length: int = array.shape[0]
        self.chunk_tokens: int = array.chunks[0]
        """Tokens that are decompressed together."""
        self.file_tokens: int = array.shards[0] if array.shards else self.chunk_tokens
        self._key = array.metadata.encode_chunk_key
        self._index: ShardIndex | None = None
        self._present: dict[int, NDArray[np.bool_]] = {}
        if array.shards:
            codecs = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))["codecs"]
            self._index = ShardIndex(name, codecs, self.file_tokens // self.chunk_tokens)
        self._check_all()

    def check_file(self, token: int) -> None:
        """Raises `ValueError` if the file with this token is missing."""
        if not self._path(token).is_file():
            raise ValueError(f"{self.name}: a chunk is missing: {self.describe(token)}")

    def check_shard(self, token: int) -> None:
        """Raises `ValueError` if the shard with this token, which could be read, lacks the token's chunk."""
        if self._index is None:
            return
        shard, within = divmod(token, self.file_tokens)
        if shard not in self._present:
            self._present[shard] = self._index.present(self._path(token))
        chunk = within // self.chunk_tokens
        if not self._present[shard][chunk]:
            tokens = self._tokens(token, self.chunk_tokens)
            raise ValueError(
                f"{self.name}: a chunk is missing: number {chunk}, with {tokens}, of the shard "
                f"{self._path(token).relative_to(self.folder)}"
            )

    def describe(self, token: int) -> str:
        """The file with this token and all tokens in it, for messages."""
        tokens = self._tokens(token, self.file_tokens)
        return f"{self._path(token).relative_to(self.folder)}, with {tokens}"

    def _path(self, token: int) -> Path:
        return self.folder / self._key((token // self.file_tokens,))

    def _tokens(self, token: int, count: int) -> str:
        first = token // count * count
        return f"tokens {first} to {min(first + count, self.length) - 1}"

    def _check_all(self) -> None:
        starts = range(0, self.length, self.file_tokens)
        try:
            # One listing instead of a question per file: there can be a hundred thousand of them.
            there = set(os.listdir(self._path(0).parent))
        except FileNotFoundError:
            there = set()
        missing = [start for start in starts if self._path(start).name not in there]
        if missing:
            raise ValueError(
                f"{self.name}: {len(missing)} of {len(starts)} chunks are missing, the first "
                f"{self.describe(missing[0])}"
            )
