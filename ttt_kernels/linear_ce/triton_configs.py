"""How cross-entropy's Triton kernels divide their work."""

from ttt_kernels.tuning import Config, interpreted

_INTERPRETED = Config((("BLOCK", 16),), 1, 1)
_CONFIGS = tuple(Config((("BLOCK", 512 * warps),), warps, 1) for warps in (1, 2, 4, 8))
"""16 elements to a thread."""


def config(cols: int) -> Config:
    """Elements of a piece of a row of so many, and warps: 4096 and 8, unless the row is shorter."""
    if interpreted():
        return _INTERPRETED
    return next((c for c in _CONFIGS if cols <= c.sizes[0][1]), _CONFIGS[-1])


def configs() -> tuple[Config, ...]:
    """Every configuration."""
    return (_INTERPRETED,) if interpreted() else _CONFIGS
