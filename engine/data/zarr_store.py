"""Token stores as the official ones are: a zarr folder with one array of tokens per split."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.folders import atomic_folder
from engine.data.store import Vocabulary, check_range, fingerprint_of, token_dtype
from engine.data.zarr_chunks import ChunkFiles

CHUNK_TOKENS = 2**20

_METADATA = ("zarr.json", ".zarray")


class ZarrStore:
    """The split `split` of the store at `path`: a one-dimensional integer array, of zarr format 2 or 3.

    Needs the package zarr. Raises `ValueError` for what is no such array, and, on opening and on reading, for
    chunks that are missing or damaged: with the file of the chunk and the tokens that it would hold. Bits that
    flipped are noticed where the array has checksums, as those of `write_token_store` have.
    """

    def __init__(self, path: str | os.PathLike[str], split: str) -> None:
        folder = Path(path) / split
        self.name = str(folder)
        _check_there(Path(path), split)
        zarr = _zarr()
        try:
            array = zarr.open_array(zarr.storage.LocalStore(folder, read_only=True), mode="r")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{self.name} is damaged or not a zarr array: {error}") from error
        if array.ndim != 1 or array.dtype.kind not in "iu" or not array.shape[0]:
            raise ValueError(
                f"{self.name} is an array of shape {array.shape} and dtype {array.dtype}; expected one dimension "
                "of integers, at least one"
            )
        self._array = array
        self.length: int = array.shape[0]
        self.vocabulary = _vocabulary(self.name, dict(array.attrs))
        self._files = ChunkFiles(self.name, folder, array)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        check_range(self, start, stop)
        size = self._files.chunk_tokens
        tokens = np.empty(stop - start, np.int64)
        for first in range(start // size * size, stop, size):
            low, high = max(start, first), min(stop, first + size)
            tokens[low - start : high - start] = self._read_chunk(low, high)
        return tokens

    def fingerprint(self) -> str:
        size = self._files.chunk_tokens
        first = self._read_chunk(0, min(size, self.length))
        last = self._read_chunk((self.length - 1) // size * size, self.length)
        return fingerprint_of(self._array.dtype, (self.length, size), first, last)

    def _read_chunk(self, start: int, stop: int) -> NDArray[np.integer]:
        # Asked of the file every time, since a chunk that goes missing later would be read as zeros too.
        self._files.check_file(start)
        try:
            tokens: NDArray[np.integer] = self._array[start:stop]
        except Exception as error:  # Every codec raises errors of its own.
            raise ValueError(
                f"{self.name}: a chunk is damaged: {self._files.describe(start)}: {error}"
            ) from error
        self._files.check_shard(start)
        return tokens


def write_token_store(
    path: str | os.PathLike[str],
    splits: Mapping[str, Iterable[NDArray[np.integer]]],
    vocabulary: Vocabulary,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[str, int]:
    """Writes a store with these splits, each the tokens (T,) that its parts hold, at `path`; all or nothing.

    Returns the tokens per split. Chunks of `chunk_tokens` tokens, zstd by blosc with a checksum, in the smallest
    dtype for the vocabulary, which every array's attributes describe. Needs the package zarr. Raises `ValueError`
    where `path` is there already, a split is empty, or a token is not in the vocabulary.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} is not accepted: it must be at least 1")
    zarr = _zarr()
    with atomic_folder(path) as folder:
        group = zarr.create_group(zarr.storage.LocalStore(folder))
        return {
            split: _write_split(group, split, parts, vocabulary, chunk_tokens)
            for split, parts in splits.items()
        }


def _write_split(
    group: Any, split: str, parts: Iterable[NDArray[np.integer]], vocabulary: Vocabulary, chunk_tokens: int
) -> int:
    codecs = importlib.import_module("zarr.codecs")
    array = group.create_array(
        split,
        shape=(0,),
        chunks=(chunk_tokens,),
        dtype=token_dtype(vocabulary.size),
        compressors=[codecs.BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"), codecs.Crc32cCodec()],
        # zarr leaves out chunks of nothing but zeros, which could not be told from missing ones.
        config={"write_empty_chunks": True},
        attributes={
            "tokenizer": vocabulary.tokenizer,
            "vocab_size": vocabulary.size,
            "bos_token_id": vocabulary.bos_token_id,
        },
    )
    written = 0
    for chunk in _chunks(parts, chunk_tokens):
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= vocabulary.size:
            raise ValueError(
                f"split {split!r} contains the token {low if low < 0 else high}; accepted are 0 to "
                f"{vocabulary.size - 1}, the vocabulary of {vocabulary.tokenizer!r}"
            )
        array.resize((written + len(chunk),))
        array[written:] = chunk.astype(array.dtype)
        written += len(chunk)
    if not written:
        raise ValueError(f"split {split!r} has no tokens")
    return written


def _chunks(parts: Iterable[NDArray[np.integer]], size: int) -> Iterator[NDArray[np.integer]]:
    """The same tokens in arrays of `size`, the last one perhaps shorter."""
    held: list[NDArray[np.integer]] = []
    count = 0
    for part in parts:
        rest = part
        while count + len(rest) >= size:
            yield np.concatenate([*held, rest[: size - count]])
            held, count, rest = [], 0, rest[size - count :]
        held.append(rest)
        count += len(rest)
    if count:
        yield np.concatenate(held)


def _check_there(path: Path, split: str) -> None:
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder; expected a token store: a zarr folder with an array per split"
        )
    if not any((path / split / name).is_file() for name in _METADATA):
        found = sorted(p.name for p in path.iterdir() if any((p / name).is_file() for name in _METADATA))
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(found) or 'none'}")


def _vocabulary(name: str, attributes: Mapping[str, Any]) -> Vocabulary | None:
    if "vocab_size" not in attributes:
        return None
    tokenizer, size, bos = (attributes.get(key) for key in ("tokenizer", "vocab_size", "bos_token_id"))
    if not isinstance(tokenizer, str) or not isinstance(size, int) or not isinstance(bos, int | None):
        raise ValueError(
            f"{name}: its attributes tokenizer={tokenizer!r}, vocab_size={size!r}, bos_token_id={bos!r} are not "
            "accepted: they must be a string, an integer, and an integer or null"
        )
    return Vocabulary(tokenizer, size, bos)


def _zarr() -> Any:
    try:
        return importlib.import_module("zarr")
    except ImportError as error:
        raise ValueError("a token store needs the package zarr: pip install '.[data]'") from error
