"""How SwiGLU's Triton kernels divide their work."""

import torch

from ttt_kernels.tuning import Config, interpreted

SEPARATE = Config((), 0, 0)
"""Not a kernel: two products by torch's BLAS and a pass between them, which large products may be faster as."""

_PASS = Config((("BLOCK", 1024),), 4, 1)
_PASS_INTERPRETED = Config((("BLOCK", 256),), 1, 1)


def of_pass() -> Config:
    """Elements of a program of the passes, 8 to a thread: with 2 bytes each, one access."""
    return _PASS_INTERPRETED if interpreted() else _PASS


def _tiles(rows: int, columns: int, inner: int, warps: int, stages: int, ptxas: str = "") -> Config:
    return Config((("BM", rows), ("BN", columns), ("BK", inner)), warps, stages, ptxas or Config.ptxas)


_INTERPRETED = (_tiles(16, 32, 32, 1, 1),)
_NARROW = (_tiles(128, 64, 64, 8, 4), _tiles(64, 64, 64, 4, 3))
_HOPPER = (_tiles(128, 128, 64, 16, 3), *_NARROW)
_AMPERE = (_tiles(128, 64, 32, 8, 3), _tiles(64, 64, 32, 4, 3))
"""For devices before Hopper, where factors of products are in registers."""
_WIDE = (_tiles(64, 64, 16, 8, 1),)


def of_products(dtype: torch.dtype, width: int, columns: int, capability: int) -> tuple[Config, ...]:
    """Ways to multiply rows of `width` with so many columns, the safest first; in interpreter mode one small tile.

    Sizes that are no multiples of 16, whose accesses have no 16 bytes, are left to torch. `capability` is the device's,
    as in sm_80.
    """
    if width % 16 or columns % 16:
        return (SEPARATE,)
    if interpreted():
        return _INTERPRETED
    narrow = _NARROW if capability >= 100 else _HOPPER if capability >= 90 else _AMPERE
    return (SEPARATE, *(_WIDE if dtype == torch.float32 else narrow))
