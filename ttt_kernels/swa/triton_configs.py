"""How attention's Triton kernels divide their work: pieces of the head dimension, and sizes of tiles."""

import torch

from ttt_kernels.tuning import Config, interpreted

HEAD_DIM = 256
"""The largest head dimension."""


def pieces(head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Powers of two whose sum is head_dim rounded up to a multiple of 16, the largest first.

    Those of float32, whose exact products have no tensor cores and hold rows of both factors in registers, are
    at most 32.
    """
    left = -(-head_dim // 16) * 16
    largest = 32 if dtype == torch.float32 else HEAD_DIM
    found = []
    while left:
        found.append(min(1 << (left.bit_length() - 1), largest))
        left -= found[-1]
    return tuple(found)


def _config(queries: int, keys: int, warps: int, stages: int) -> Config:
    return Config((("BQ", queries), ("BK", keys)), warps, stages)


_INTERPRETED = (_config(16, 32, 1, 1),)
"""Small and not square, so that short sequences have tiles of every kind."""

_NARROW = {
    "forward": {
        64: (_config(128, 64, 4, 3), _config(128, 128, 8, 2), _config(64, 64, 4, 3)),
        128: (_config(128, 64, 8, 3), _config(128, 128, 8, 2), _config(64, 64, 4, 3)),
        256: (_config(128, 32, 8, 2), _config(64, 32, 4, 2), _config(128, 64, 8, 2)),
    },
    "backward_queries": {
        64: (_config(64, 64, 4, 3), _config(128, 64, 8, 3), _config(128, 32, 4, 3)),
        128: (_config(64, 64, 4, 2), _config(128, 64, 8, 2), _config(128, 32, 8, 3)),
        256: (_config(64, 32, 4, 2), _config(128, 32, 8, 1)),
    },
    "backward_keys": {
        64: (_config(64, 64, 4, 3), _config(64, 128, 8, 3), _config(32, 64, 4, 3)),
        128: (_config(64, 64, 8, 2), _config(32, 128, 8, 2), _config(32, 64, 4, 2)),
        256: (_config(32, 64, 8, 1), _config(16, 64, 8, 2)),
    },
    "along": {
        64: (_config(64, 64, 4, 2), _config(128, 64, 8, 2), _config(128, 32, 4, 2)),
        128: (_config(64, 32, 4, 2), _config(128, 64, 8, 2), _config(128, 32, 8, 2)),
        256: (_config(64, 32, 8, 1), _config(128, 16, 8, 2)),
    },
    "double_backward_queries": {
        64: (_config(64, 64, 4, 2), _config(128, 64, 8, 2), _config(128, 32, 4, 2)),
        128: (_config(64, 32, 4, 2), _config(128, 32, 8, 2), _config(64, 64, 8, 2)),
        256: (_config(64, 32, 8, 1), _config(64, 16, 8, 2)),
    },
    "double_backward_keys": {
        64: (_config(64, 64, 8, 2), _config(32, 64, 4, 2), _config(64, 128, 8, 2)),
        128: (_config(32, 64, 8, 2), _config(32, 128, 8, 1), _config(16, 64, 4, 2)),
        256: (_config(16, 64, 8, 1), _config(32, 64, 8, 1)),
    },
}
"""Kernel -> largest head dimension -> configurations for bfloat16 and float16."""

_WIDE = {name: {256: (_config(32, 32, 4, 1),)} for name in _NARROW}
"""As `_NARROW`, for float32."""


def configs(kernel: str, head_dim: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """The configurations of a kernel, the safest first; in interpreter mode a small one."""
    if interpreted():
        return _INTERPRETED
    table = (_WIDE if dtype == torch.float32 else _NARROW)[kernel]
    return next(found for largest, found in table.items() if head_dim <= largest)
