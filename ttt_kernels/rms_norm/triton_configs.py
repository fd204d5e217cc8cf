"""How RMSNorm's Triton kernels divide their work: rows of a tile, and tiles of a program."""

from functools import cache

from ttt_kernels.tuning import Config, interpreted

LARGEST = 8192
"""The longest row that a program's registers hold with everything that a double backward has of it."""
SUMMED = 4096
"""The longest of which they hold the sum over rows too."""
PROGRAMS = 1056
"""At most as many programs sum over rows: eight on each multiprocessor of an H200."""

_TILES = {
    "forward": ((4096, 16), (2048, 16), (2048, 8)),
    "backward": ((2048, 16), (2048, 8), (1024, 8)),
    "double_backward": ((2048, 16), (1024, 8), (2048, 8)),
    "jvp_backward": ((2048, 16), (1024, 8), (2048, 8)),
}
"""Order -> elements of a tile of short rows, and of a thread."""
_SUMS = Config((("ROWS", 64), ("BLOCK", 16)), 4, 1)


def padded(n: int) -> int:
    """The power of two that a row of n elements is padded to."""
    return 1 << (n - 1).bit_length()


def configs(order: str, n: int) -> tuple[Config, ...]:
    """What a kernel can be launched with, the safest first: `ROWS` rows padded to `BLOCK` elements."""
    if interpreted():
        return (Config((("ROWS", 4), ("BLOCK", padded(n))), 4, 1),)
    return _compiled(order, padded(n))


@cache
def _compiled(order: str, block: int) -> tuple[Config, ...]:
    found = []
    for tile, each in _TILES[order]:
        rows = max(1, tile // block)
        warps = min(max(1, rows * block // (32 * each)), 16)
        found.append(Config((("ROWS", rows), ("BLOCK", block)), warps, 1))
    return tuple(dict.fromkeys(found))


def sums() -> Config:
    """With what `total` is launched: `ROWS` partial sums at a time, of `BLOCK` columns."""
    return Config((("ROWS", 2), ("BLOCK", 16)), 4, 1) if interpreted() else _SUMS


def span(rows: int, order: str, n: int) -> int:
    """Rows of a program that sums over them, whichever configuration it has."""
    largest = max(dict(config.sizes)["ROWS"] for config in configs(order, n))
    most = 3 if interpreted() else PROGRAMS
    return -(-rows // (most * largest)) * largest
