"""Checks of the engine's arguments; each raises a `ValueError` that names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import TTTConfig


def tokens(
    call: str, value: Tensor, config: TTTConfig, device: torch.device, *, dims: int = 2, waits: bool = True
) -> None:
    """`value` is an integer tensor of `dims` dimensions, none empty, on the model's device, in the vocabulary.

    The last is not checked inside torch.compile, and on a GPU only if the call `waits` for it.
    """
    name = "tokens" if dims == 2 else "token"
    accepted = "(B, T)" if dims == 2 else "(B,)"
    if not isinstance(value, Tensor):
        raise ValueError(f"{call}: {name} must be a tensor {accepted} of int64, got {type(value).__name__}")
    if value.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{call}: {name} of shape {tuple(value.shape)} has dtype {value.dtype}; accepted are int64 and int32"
        )
    if value.dim() != dims or value.numel() == 0:
        raise ValueError(
            f"{call}: {name} has shape {tuple(value.shape)}; accepted is {accepted} with at least one token"
        )
    if value.device != device:
        raise ValueError(f"{call}: {name} is on {value.device} but the model is on {device}")
    if torch.compiler.is_compiling() or (value.device.type != "cpu" and not waits):
        return
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{call}: {name} contains {wrong}; accepted are 0 to {config.vocab_size - 1}, the vocabulary of "
            f"{config.name!r}"
        )
