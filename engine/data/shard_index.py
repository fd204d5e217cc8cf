"""Which chunks a shard of a zarr array holds, from the index that the shard itself carries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Both numbers of an absent chunk's entry (zarr specification, sharding codec, "Binary shard format").
_ABSENT = np.uint64(2**64 - 1)
_ENTRY_BYTES = 16
_CHECKSUM_BYTES = 4


class ShardIndex:
    """Where the shards of a one-dimensional array have their index.

    `codecs` are the array's, as its zarr.json has them, and `chunks` is how many a shard has. Raises
    `ValueError`, which calls the array `name`, for shards within shards and for an index that is stored
    otherwise than zarr does by default: what they lack cannot be told.
    """

    def __init__(self, name: str, codecs: list[dict[str, Any]], chunks: int) -> None:
        settings = codecs[0]["configuration"]
        inner = [codec["name"] for codec in settings["codecs"]]
        index = [codec["name"] for codec in settings["index_codecs"]]
        endian = settings["index_codecs"][0].get("configuration", {}).get("endian")
        if (
            len(codecs) > 1
            or "sharding_indexed" in inner
            or index not in (["bytes"], ["bytes", "crc32c"])
            or endian != "little"
        ):
            raise ValueError(
                f"{name}: the shards of this array cannot be checked for missing chunks; accepted is one level "
                "of sharding whose index is little-endian bytes, with or without crc32c"
            )
        self.chunks = chunks
        self.at_end = settings.get("index_location", "end") == "end"
        self.bytes_after = _CHECKSUM_BYTES * (len(index) - 1)

    def present(self, shard: Path) -> NDArray[np.bool_]:
        """Of every chunk of an undamaged shard, (chunks,), whether it is there."""
        size = _ENTRY_BYTES * self.chunks
        with open(shard, "rb") as file:
            if self.at_end:
                file.seek(-size - self.bytes_after, os.SEEK_END)
            entries = np.frombuffer(file.read(size), "<u8").reshape(self.chunks, 2)
        return (entries != _ABSENT).any(axis=1)
