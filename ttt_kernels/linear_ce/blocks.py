"""The vocabulary in blocks, so that all logits never exist together."""

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Device -> logits of a block, all rows together. On a processor 4 MB in float32, which the passes over them find in
cache; the products run equally fast at half and at four times as many (measured with 1024 rows of 768 elements). On a
GPU 512 MB: of many rows a block still has so many classes that what its products read and add up to is little beside
them."""


def block_size(rows: int, classes: int, device: torch.device) -> int:
    """Classes of a block: from 512 on, so few that the block has about as many logits as the device's blocks."""
    cpu = device.type != "cuda"
    size = BLOCK_ELEMENTS["cpu" if cpu else "cuda"] // max(rows, 1) // 64 * 64
    return min(max(size, 512), 8192 if cpu else 32768, classes)


def blocks(rows: int, classes: int, device: torch.device) -> Iterator[slice]:
    """The classes of each block."""
    size = block_size(rows, classes, device)
    for first in range(0, classes, size):
        yield slice(first, min(first + size, classes))
