"""Checks of arguments that several operators share; each raises a `ValueError` that names the argument."""

import torch
from torch import Tensor


def shape(t: Tensor) -> str:
    """A shape as error messages print it."""
    return str(tuple(t.shape))


def floating(operator: str, **tensors: Tensor) -> None:
    """Every tensor is a dense floating-point tensor of at least 16 bits an element."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{operator}: {name} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point() or t.dtype.itemsize < 2:
            raise ValueError(
                f"{operator}: {name} of shape {shape(t)} has dtype {t.dtype}; accepted are floating-point dtypes "
                f"of 16 bits and more"
            )
        if t.layout != torch.strided:
            raise ValueError(
                f"{operator}: {name} of shape {shape(t)} has layout {t.layout}; accepted is torch.strided"
            )


def same_device(operator: str, **tensors: Tensor) -> None:
    """All tensors are on the device of the first."""
    (first_name, first), *rest = tensors.items()
    for name, t in rest:
        if t.device != first.device:
            raise ValueError(f"{operator}: {name} is on {t.device} but {first_name} is on {first.device}")


def weight_dtype(operator: str, x: Tensor, **weights: Tensor) -> None:
    """Weights have x's dtype, or are float32 beside a bfloat16 or float16 x."""
    for name, w in weights.items():
        mixed = w.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
        if w.dtype != x.dtype and not mixed:
            raise ValueError(
                f"{operator}: {name} of shape {shape(w)} has dtype {w.dtype}; accepted are x's dtype {x.dtype}"
                f"{' and torch.float32' if x.dtype in (torch.bfloat16, torch.float16) else ''}"
            )
