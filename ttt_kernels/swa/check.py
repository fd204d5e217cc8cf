"""What attention refuses."""

from typing import Any

import torch
from torch import Tensor

from ttt_kernels import checks


def arguments(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Every documented `ValueError` about the arguments of attention.

    The numbers in key_lengths and cu_seqlens are read only where that is free: eagerly, on the processor.
    """
    checks.floating(name, q=q, k=k, v=v)
    checks.same_device(name, q=q, k=k, v=v)
    _shapes(name, q, k, v)
    if window is not None and (
        isinstance(window, bool) or not isinstance(window, int) or not 1 <= window < 2**63
    ):
        raise ValueError(f"{name}: window is {window!r}; accepted are integers from 1 to 2**63 - 1, and None")
    if isinstance(scale, Tensor):
        raise ValueError(
            f"{name}: scale is a tensor of shape {checks.shape(scale)}; accepted are a number, which has no "
            f"gradient, and None"
        )
    if key_lengths is not None:
        _integers(name, "key_lengths", key_lengths, q)
        if key_lengths.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name}: key_lengths has shape {checks.shape(key_lengths)}; accepted is one number per "
                f"sequence, ({q.shape[0]},)"
            )
    if cu_seqlens is not None:
        _integers(name, "cu_seqlens", cu_seqlens, q)
        _packing(name, cu_seqlens, q, k)
    if all(_free_to_read(t) for t in (key_lengths, cu_seqlens) if t is not None):
        values(name, k.shape[1], key_lengths, cu_seqlens)


def values(name: str, keys: int, key_lengths: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """The `ValueError`s about the numbers in key_lengths and cu_seqlens, for that many keys."""
    if key_lengths is not None and key_lengths.numel():
        lengths = key_lengths.tolist()
        if not 0 <= min(lengths) <= max(lengths) <= keys:
            raise ValueError(
                f"{name}: key_lengths is {lengths}; accepted are numbers of keys from 0 to {keys}"
            )
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != keys or ends != sorted(ends):
            raise ValueError(
                f"{name}: cu_seqlens is {ends}; accepted are boundaries that start at 0, do not fall, and end "
                f"at the length {keys}"
            )


def _shapes(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for label, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4 or 0 in t.shape[2:]:
            raise ValueError(
                f"{name}: {label} has shape {checks.shape(t)}; accepted is (batch, length, heads, head_dim) "
                f"with at least one head and head_dim at least 1"
            )
        if t.dtype != q.dtype:
            raise ValueError(f"{name}: {label} has dtype {t.dtype}; accepted is q's dtype {q.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"{name}: v has shape {checks.shape(v)}; accepted is k's shape {checks.shape(k)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{name}: q has shape {checks.shape(q)} and k {checks.shape(k)}; accepted are equal batch and "
            f"head_dim"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{name}: q has {q.shape[2]} heads and k {k.shape[2]}; accepted are multiples of k's "
            f"number of heads"
        )
    if k.shape[1] < max(q.shape[1], 1):
        raise ValueError(
            f"{name}: q has length {q.shape[1]} and k {k.shape[1]}; accepted are at least as many keys "
            f"as queries, and one key"
        )


def _integers(name: str, label: str, t: Any, q: Tensor) -> None:
    if not isinstance(t, Tensor) or t.dtype not in (torch.int64, torch.int32) or t.dim() != 1:
        found = (
            f"dtype {t.dtype} and shape {checks.shape(t)}"
            if isinstance(t, Tensor)
            else f"type {type(t).__name__}"
        )
        raise ValueError(
            f"{name}: {label} has {found}; accepted is an int64 or int32 tensor of one dimension"
        )
    if t.device != q.device:
        raise ValueError(f"{name}: {label} is on {t.device} but q is on {q.device}")


def _free_to_read(t: Tensor) -> bool:
    """Whether the numbers in t can be read without a synchronization or a graph break."""
    if torch.compiler.is_compiling() or t.device.type != "cpu" or type(t) is not Tensor:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _packing(name: str, cu_seqlens: Tensor, q: Tensor, k: Tensor) -> None:
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{name}: cu_seqlens is given with q of shape {checks.shape(q)} and k of shape {checks.shape(k)}"
            f"; accepted are sequences packed in a batch of 1, with as many queries as keys"
        )
    if cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name}: cu_seqlens has shape {checks.shape(cu_seqlens)}; accepted are at least two numbers"
        )
