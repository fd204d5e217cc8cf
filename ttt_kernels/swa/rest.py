"""What a 16-bit output of attention loses to rounding, and when it is kept; see `operator`."""

import torch
from torch import Tensor

from ttt_kernels.extension import compute_dtype


def recorded(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether autograd may ask for a gradient, which reads the rest."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))


def empty_rest(q: Tensor, keep_rest: bool) -> Tensor:
    """Memory for the rest, (B, Tq, Hq, D) in q's dtype; without elements where it is not kept or nothing is lost."""
    return q.new_empty(q.shape if keep_rest and compute_dtype(q.dtype) != q.dtype else 0)
