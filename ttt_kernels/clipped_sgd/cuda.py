"""Clipped SGD in place on the CUDA kernels of csrc/cuda/clipped_sgd.cu: all tensors of all sequences in one call."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels import extension
from ttt_kernels.backends import refuse_on_cuda
from ttt_kernels.clipped_sgd.reference import Tensors
from ttt_kernels.clipped_sgd.rows import rows_of
from ttt_kernels.extension import addresses, dtype_code
from ttt_kernels.triton_launch import on


def refuse(tensors: tuple[Tensor, ...]) -> str | None:
    """As `refuse_on_cuda`, but for a learning rate, which may be on the CPU and of any floating dtype."""
    return refuse_on_cuda(tuple(t for t in tensors if t.dim()))


def update_(
    weights: Tensors,
    grads: Tensors,
    lr: Tensor,
    max_norm: float | None,
    copies: Tensors | None,
    active: Tensor | None,
) -> Tensor:
    """As `reference.update_`; the elements of a sequence are contiguous in weights and copies."""
    first, kernels = weights[0], extension.cuda_kernels()
    g_rows = [rows_of(g) for g in grads]
    copied: Sequence[Tensor | None] = copies or [None] * len(weights)
    # A row of TTT_CLIPPED_SGD_TENSOR (csrc/cuda/clipped_sgd.h) for each tensor.
    table = array("q")
    for w, g, copy in zip(weights, g_rows, copied, strict=True):
        table.extend((w.shape[1:].numel(), *_located(g), *_located(w), *_located(copy)))
    tensors = (table.buffer_info()[0], len(weights))
    if lr.is_cpu:
        rate = (float(lr), 0, 0)
    else:
        lr = lr if lr.dtype in extension.DTYPES else lr.double()
        rate = (0.0, dtype_code(lr.dtype), lr.data_ptr())
    with on(first.device):
        norm = first.new_empty(first.shape[:1], dtype=torch.float32)
        scratch = first.new_empty((len(first), kernels.clipped_sgd_parts(*tensors)), dtype=torch.float64)
        kernels.clipped_sgd_update(
            dtype_code(first.dtype), dtype_code((copies or weights)[0].dtype), *tensors, len(first), *rate,
            max_norm or 0.0, *addresses(active), 0 if active is None else active.stride(0), scratch.data_ptr(),
            norm.data_ptr(), extension.stream(first.device),
        )  # fmt: skip
    return norm


def _located(t: Tensor | None) -> tuple[int, int]:
    """Address and elements between sequences of a tensor that may be missing."""
    return (0, 0) if t is None else (t.data_ptr(), t.stride(0))
