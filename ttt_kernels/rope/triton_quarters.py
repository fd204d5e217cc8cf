"""How far a step of the position turns each pair, in quarter turns, on the device that turns them."""

import functools
import math

import torch
from torch import Tensor

from ttt_kernels.rope.reference import inverse_frequencies


def _compute(head_dim: int, theta: float, device: torch.device) -> Tensor:
    return (inverse_frequencies(head_dim, theta) * (2 / math.pi)).to(device)


_kept = functools.lru_cache(maxsize=16)(_compute)


def quarters(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/D) * 2 / pi for i < D/2, float64 on the device, kept for the next call.

    A CUDA graph's capture, which can neither copy from the host nor keep what its replays write, gets a table of
    its own unless one is kept already.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return _kept(head_dim, theta, device)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return theta**-exponents * (2 / math.pi)
