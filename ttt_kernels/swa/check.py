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
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Every documented `ValueError` about the arguments of attention.

    The values of key_lengths and cu_seqlens are read only where that is free: eagerly, on the processor.
    """
    checks.floating(name, q=q, k=k, v=v)
    checks.same_device(name, q=q, k=k, v=v)
    _shapes(name, q, k, v)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"{name}: window is {window!r}; accepted are integers of at least 1, and None")
    if key_lengths is not None:
        _integers(name, "key_lengths", key_lengths, q)
        _key_lengths(name, key_lengths, q.shape[0], k.shape[1])
    if cu_seqlens is not None:
        _integers(name, "cu_seqlens", cu_seqlens, q)
        _cu_seqlens(name, cu_seqlens, q, k)


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


def _values(t: Tensor) -> list[int] | None:
    """The numbers in t, or None where reading them would cost a synchronization or a graph break."""
    if torch.compiler.is_compiling() or t.device.type != "cpu" or type(t) is not Tensor:
        return None
    return None if torch._C._functorch.is_functorch_wrapped_tensor(t) else t.tolist()


def _key_lengths(name: str, key_lengths: Tensor, batch: int, keys: int) -> None:
    if key_lengths.shape[0] != batch:
        raise ValueError(
            f"{name}: key_lengths has shape {checks.shape(key_lengths)}; accepted is one number per "
            f"sequence, ({batch},)"
        )
    values = _values(key_lengths)
    if values and not 0 <= min(values) <= max(values) <= keys:
        raise ValueError(f"{name}: key_lengths is {values}; accepted are numbers of keys from 0 to {keys}")


def _cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor, k: Tensor) -> None:
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{name}: cu_seqlens is given with q of shape {checks.shape(q)} and k of shape {checks.shape(k)}"
            f"; accepted are sequences packed in a batch of 1, with as many queries as keys"
        )
    if cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name}: cu_seqlens has shape {checks.shape(cu_seqlens)}; accepted are at least two numbers"
        )
    values = _values(cu_seqlens)
    if values and (values[0] != 0 or values[-1] != k.shape[1] or values != sorted(values)):
        raise ValueError(
            f"{name}: cu_seqlens is {values}; accepted are boundaries that start at 0, do not fall, and end "
            f"at the length {k.shape[1]}"
        )
