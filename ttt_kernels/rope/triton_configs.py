"""How the rotation's Triton kernels divide their work: positions and heads of a program."""

from functools import cache

from ttt_kernels.tuning import Config, interpreted

LARGEST = 1024
"""The largest head dimension of which a program holds the angles of a position."""


def padded_pairs(head_dim: int) -> int:
    """The power of two that the pairs of a head are padded to."""
    return 1 << (head_dim // 2 - 1).bit_length()


def configs(head_dim: int, heads: int) -> tuple[Config, ...]:
    """What the kernel can be launched with, the safest first.

    A thread turns 16 bytes of bfloat16 of each head; the more heads a program has, the more of its loads are under
    way at once and the fewer of its instructions are for angles.
    """
    return _chosen(head_dim, heads, ((4, 4), (4, 8), (2, 4)))


def _chosen(head_dim: int, heads: int, sizes: tuple[tuple[int, int], ...]) -> tuple[Config, ...]:
    """`sizes`: warps of a compiled program, and how many heads it has at most."""
    pairs = padded_pairs(head_dim)
    return (_config(4, pairs, min(2, heads), 1),) if interpreted() else _compiled(pairs, heads, sizes)


@cache
def _compiled(pairs: int, heads: int, sizes: tuple[tuple[int, int], ...]) -> tuple[Config, ...]:
    found = []
    for warps, most in sizes:
        positions = max(1, warps * 32 * 4 // pairs)
        found.append(_config(positions, pairs, min(most, 1 << (heads - 1).bit_length()), warps))
    return tuple(dict.fromkeys(found))


def _config(positions: int, pairs: int, heads: int, warps: int) -> Config:
    return Config((("POSITIONS", positions), ("PAIRS", pairs), ("HEADS", heads)), warps, 1)


WIDEST_HEAD = 256
"""The largest head dimension of which a program has queries, keys and values of a position at once."""


def configs_of_heads(head_dim: int, heads: int) -> tuple[Config, ...]:
    """With what the kernels of triton_heads.py can be launched, the safest first; as `configs`."""
    return _chosen(head_dim, heads, ((4, 2), (4, 4), (4, 1)))
