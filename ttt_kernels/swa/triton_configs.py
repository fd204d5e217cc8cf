"""How attention's Triton kernels divide their work: pieces of the head dimension, and sizes of tiles."""

import torch

from ttt_kernels.tuning import Config, interpreted

HEAD_DIM = 256
"""The largest head dimension."""
SHARED_HEAD_DIM = 128
"""The largest of which one program sums gradients of keys and values."""


def pieces(kernel: str, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Powers of two whose sum is head_dim rounded up to a multiple of 16, the largest first.

    The larger, the fewer instructions; what must be in registers at once limits them: columns of both factors in
    float32, the last step of `along`, and sums of wide heads.
    """
    left = -(-head_dim // 16) * 16
    narrow = kernel == "along" or kernel.startswith("jvp") or head_dim > SHARED_HEAD_DIM
    largest = 64 if narrow else 128
    if dtype == torch.float32:
        largest = 16
    found = []
    while left:
        found.append(min(1 << (left.bit_length() - 1), largest))
        left -= found[-1]
    return tuple(found)


def sums_both(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether registers hold sums of gradients of keys and of values at once."""
    return head_dim <= SHARED_HEAD_DIM and dtype != torch.float32


def sums_together(kernel: str, head_dim: int, dtype: torch.dtype) -> list[tuple[str, ...]]:
    """Which results a launch by keys sums at once in the backward with tangents, whose kernel `kernel` names."""
    results = ("t_kbar", "t_vbar") if kernel == "jvp_keys_before" else ("t_kbar", "t_vbar", "t_dk", "t_dv")
    if not sums_both(head_dim, dtype):
        return [(result,) for result in results]
    if head_dim <= 64 or len(results) == 2:
        return [results]
    if head_dim <= 96:
        return [("t_kbar", "t_dk"), ("t_vbar", "t_dv")]
    return [("t_kbar",), ("t_vbar",), ("t_dk", "t_dv")]


def parts(kernel: str, head_dim: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """First piece and number of pieces of what each launch of a kernel sums.

    Of wide heads registers do not hold sums of all in the double backward and with tangents.
    """
    count = len(pieces(kernel, head_dim, dtype))
    if head_dim <= SHARED_HEAD_DIM or (dtype == torch.float32 and not kernel.startswith("jvp")):
        return [(0, count)]
    step = 2 if kernel in ("double_backward_queries", "jvp_forward") else 1
    if dtype == torch.float32:
        step = 8
    return [(first, min(step, count - first)) for first in range(0, count, step)]


def config(queries: int, keys: int, warps: int, stages: int) -> Config:
    """Tiles of so many queries and keys."""
    return Config((("BQ", queries), ("BK", keys)), warps, stages)


def _exact(queries: int, keys: int, warps: int) -> Config:
    """Tiles of float32, whose unrolled products ptxas at its highest level reorders until registers overflow."""
    return Config((("BQ", queries), ("BK", keys)), warps, 1, "--opt-level=1")


def _unguided(queries: int, keys: int, warps: int) -> Config:
    """Tiles with which ptxas spills only if told to have one block on a multiprocessor."""
    return Config((("BQ", queries), ("BK", keys)), warps, 1, "")


def _crowded(queries: int, keys: int, warps: int, stages: int, blocks: int) -> Config:
    """Tiles of programs that leave registers for so many on a multiprocessor, where ptxas alone would take more."""
    return Config((("BQ", queries), ("BK", keys)), warps, stages, f"--minnctapersm={blocks}")


Table = dict[str, dict[int, tuple[Config, ...]]]
"""Kernel -> largest head dimension -> configurations."""

_INTERPRETED = (config(16, 32, 1, 1),)
"""Small and not square, so that short sequences have tiles of every kind."""

_NARROW: Table = {
    "forward": {
        64: (config(128, 64, 4, 3), _crowded(128, 64, 8, 3, 2), config(128, 128, 8, 2), config(64, 64, 4, 3)),
        80: (config(128, 64, 4, 3), config(128, 128, 8, 2), config(64, 64, 4, 3)),
        128: (config(64, 64, 4, 2), config(128, 64, 8, 3), config(128, 128, 8, 2)),
        256: (config(64, 32, 4, 2),),
    },
    "backward_queries": {
        64: (_crowded(64, 64, 4, 3, 3), config(128, 32, 4, 3), config(128, 64, 8, 3)),
        80: (config(64, 64, 4, 3), config(128, 32, 4, 3), config(128, 64, 8, 2)),
        128: (config(64, 64, 4, 2), config(128, 64, 8, 2)),
        256: (config(64, 32, 4, 1),),
    },
    "backward_keys": {
        64: (config(32, 64, 4, 2), config(64, 64, 4, 3), config(64, 128, 8, 3)),
        80: (config(32, 64, 4, 3), config(64, 64, 4, 2), config(64, 128, 8, 2)),
        128: (config(32, 64, 4, 1), config(32, 128, 8, 2), config(32, 128, 8, 1)),
        256: (config(16, 64, 4, 1),),
    },
    "along": {
        64: (config(64, 32, 4, 2), config(128, 64, 8, 2)),
        128: (config(64, 32, 4, 1), config(64, 32, 4, 2)),
        256: (config(64, 16, 4, 1),),
    },
    "double_backward_queries": {
        64: (config(64, 64, 4, 1), config(128, 64, 8, 2)),
        128: (config(64, 32, 4, 1), config(128, 32, 8, 2)),
        256: (config(64, 16, 4, 1),),
    },
    "double_backward_keys": {
        64: (config(32, 64, 4, 1), config(16, 64, 4, 2), config(32, 128, 8, 1)),
        80: (config(16, 64, 4, 1), config(32, 128, 8, 1)),
        128: (config(16, 64, 4, 1),),
        256: (_unguided(16, 64, 4),),
    },
    "jvp_forward": {
        64: (config(64, 32, 4, 2), config(64, 64, 4, 3), config(128, 64, 8, 2)),
        80: (config(64, 32, 4, 3),),
        128: (config(64, 32, 4, 2),),
        256: (config(64, 16, 4, 1),),
    },
    "jvp_backward_queries": {
        64: (config(64, 32, 4, 2), config(64, 32, 4, 3), config(128, 32, 8, 2)),
        80: (config(64, 32, 4, 1),),
        128: (config(64, 16, 4, 1),),
        256: (_unguided(64, 16, 4),),
    },
    "jvp_backward_keys": {
        64: (config(16, 64, 4, 1), config(16, 64, 4, 3), config(16, 128, 8, 2)),
        80: (config(16, 64, 4, 1), config(16, 128, 8, 1)),
        128: (config(16, 64, 4, 1),),
        256: (_unguided(16, 64, 4),),
    },
    "jvp_keys_before": {
        64: (config(32, 64, 4, 1), config(32, 64, 4, 3), config(32, 128, 8, 2)),
        80: (config(32, 64, 4, 1), config(32, 128, 8, 2)),
        128: (config(16, 64, 4, 1),),
        256: (_unguided(16, 64, 4),),
    },
}
"""For bfloat16 and float16.

A program has 16 rows a warp on the side of its sums: with fewer, Triton 3.6 to 3.9 divides products among warps in two
ways and moves the sums between them in every step (seen in its intermediate code for sm_90).

Warps of a program wait for one another at every tile, so what overlaps one program's exponentials is the products of
another: mostly two of them fit on a multiprocessor. Rows are loaded a tile ahead with three stages; with two, the next
tile's loads begin when this one's products have been issued, and are waited for at once (in machine code for sm_90).
A program's queries share the keys that it loads, past the L1 cache: with 64 of them, twice the bytes for a product.
"""

_AMPERE: Table = {
    "forward": {
        64: (config(64, 32, 4, 3), config(128, 64, 8, 2)),
        128: (config(64, 32, 4, 2),),
        256: (config(64, 16, 8, 1),),
    },
    "backward_queries": {
        64: (config(64, 32, 4, 2),),
        128: (config(64, 32, 8, 2),),
        256: (config(16, 32, 4, 1),),
    },
    "backward_keys": {
        64: (config(32, 32, 4, 2),),
        128: (config(32, 64, 8, 1),),
        256: (config(16, 32, 8, 1),),
    },
    "along": {64: (config(32, 32, 4, 2),), 128: (config(32, 32, 8, 1),), 256: (config(32, 16, 8, 1),)},
    "double_backward_queries": {
        64: (config(64, 32, 8, 1),),
        128: (config(32, 16, 8, 1),),
        256: (config(32, 16, 8, 1),),
    },
    "double_backward_keys": {
        64: (config(16, 64, 8, 1),),
        128: (config(16, 32, 8, 1),),
        256: (config(16, 16, 8, 1),),
    },
    "jvp_forward": {
        64: (config(64, 32, 8, 2),),
        128: (config(32, 32, 8, 1),),
        256: (config(16, 16, 4, 1),),
    },
    "jvp_backward_queries": {
        64: (config(64, 32, 8, 1),),
        96: (config(32, 16, 8, 1),),
        256: (config(16, 16, 8, 1),),
    },
    "jvp_backward_keys": {
        64: (config(16, 32, 4, 1),),
        128: (config(16, 32, 8, 1),),
        256: (config(16, 16, 8, 1),),
    },
    "jvp_keys_before": {
        64: (config(16, 64, 8, 1),),
        128: (config(16, 32, 8, 1),),
        256: (config(16, 16, 8, 1),),
    },
}
"""As `_NARROW`, for devices before Hopper, where factors of products are in registers."""

_BLACKWELL: Table = {
    **_NARROW,
    "forward": {
        64: (config(64, 64, 4, 3), config(128, 64, 8, 3)),
        128: (config(64, 64, 4, 2), config(128, 64, 8, 3)),
        256: (config(64, 32, 4, 2),),
    },
    "backward_queries": {
        64: (config(64, 64, 4, 3), config(128, 64, 8, 3)),
        128: (config(64, 64, 4, 2), config(128, 64, 8, 2)),
        256: (config(64, 32, 4, 1),),
    },
    "backward_keys": {
        128: (config(32, 64, 4, 1), config(64, 128, 8, 1)),
        256: (config(16, 64, 4, 1),),
    },
    "along": {**_NARROW["along"], 128: (config(64, 32, 4, 1), config(128, 32, 8, 2))},
    "double_backward_queries": {
        **_NARROW["double_backward_queries"],
        64: (config(64, 32, 4, 1), config(128, 64, 8, 1)),
    },
    "double_backward_keys": {
        64: (config(32, 128, 8, 1),),
        128: (config(16, 64, 4, 1),),
        256: (config(16, 64, 8, 1),),
    },
    "jvp_forward": {
        64: (config(64, 32, 4, 2),),
        128: (config(64, 16, 4, 1),),
        256: (config(64, 16, 4, 1),),
    },
    "jvp_backward_queries": {
        **_NARROW["jvp_backward_queries"],
        64: (config(64, 32, 4, 2), config(128, 32, 8, 2)),
    },
    "jvp_backward_keys": {
        64: (config(32, 64, 4, 1),),
        128: (config(16, 64, 4, 1),),
        256: (_unguided(16, 64, 4),),
    },
    "jvp_keys_before": {
        64: (config(32, 64, 4, 1),),
        128: (config(16, 64, 4, 1),),
        256: (_unguided(16, 64, 4),),
    },
}
"""As `_NARROW`, for devices from sm_100 on."""

_WIDE: Table = {
    "forward": {128: (_exact(32, 32, 4),), 256: (_exact(32, 32, 8),)},
    "backward_queries": {128: (_exact(32, 32, 4),), 256: (_exact(16, 16, 4),)},
    "backward_keys": {128: (_exact(32, 32, 4),), 256: (_exact(32, 32, 8),)},
    "along": {128: (_exact(32, 16, 8),), 256: (_exact(16, 16, 8),)},
    "double_backward_queries": {256: (_exact(32, 16, 8),)},
    "double_backward_keys": {80: (_exact(16, 16, 4),), 128: (_exact(16, 32, 8),), 256: (_exact(32, 16, 8),)},
    "jvp_forward": {256: (_exact(16, 16, 8),)},
    "jvp_backward_queries": {64: (_exact(32, 16, 8),), 256: (_exact(16, 16, 8),)},
    "jvp_backward_keys": {256: (_exact(16, 16, 4),)},
    "jvp_keys_before": {256: (_exact(16, 16, 4),)},
}
"""As `_NARROW`, for float32."""


def configs(kernel: str, head_dim: int, dtype: torch.dtype, capability: int) -> tuple[Config, ...]:
    """The configurations of a kernel, the safest first; in interpreter mode a small one.

    `capability` is the device's, as in sm_80.
    """
    if interpreted():
        return _INTERPRETED
    narrow = _BLACKWELL if capability >= 100 else _NARROW if capability >= 90 else _AMPERE
    table = _WIDE if dtype == torch.float32 else narrow
    return next(found for largest, found in table[kernel].items() if head_dim <= largest)
