"""Tables of cosines and sines for the C++ kernels, kept while the same positions come again."""

import functools

import numpy as np
import torch
from torch import Tensor

from ttt_kernels.rope.reference import inverse_frequencies

_LARGEST = 1 << 20
"""Elements of a table that is still worth keeping (4 MiB of float32)."""


def _compute(positions: bytes, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    steps = torch.from_numpy(np.frombuffer(positions, dtype=np.int64).astype(np.float64))
    angles = steps[:, None] * inverse_frequencies(head_dim, theta)
    return angles.cos().to(dtype), angles.sin().to(dtype)


# Every layer of a model turns its queries and keys by the same few tables, one after the other.
_kept = functools.lru_cache(maxsize=4)(_compute)


def tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (number of positions, D/2), angles in float64 and then rounded to `dtype`.

    Tables are kept by the positions' contents: reading 4096 of them takes 10 microseconds, their cosines and
    sines a millisecond.

    Args:
        positions: int64 on the CPU, any shape.
        head_dim: D, even.
        theta: base of the frequencies.
        dtype: float32 or float64.
    """
    small = positions.numel() * (head_dim // 2) <= _LARGEST
    return (_kept if small else _compute)(positions.numpy().tobytes(), head_dim, theta, dtype)


def angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`tables` (number of positions, D/2) on the positions' device; on CUDA nothing comes from the host or waits.

    Args:
        positions: (n,) int64
        head_dim: D, even.
        theta: base of the frequencies.
        dtype: float32 or float64.
    """
    if positions.device.type != "cuda":
        cos, sin = tables(positions.cpu(), head_dim, theta, dtype)
        return cos.to(positions.device), sin.to(positions.device)
    return _on_device(positions, head_dim, theta, dtype)


def _on_device(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    turned = positions.double()[:, None] * theta**-exponents
    return turned.cos().to(dtype), turned.sin().to(dtype)
