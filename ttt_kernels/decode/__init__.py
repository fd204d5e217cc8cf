"""One token of each sequence through a whole Transformer, for engines: no derivatives, caches in place."""

from typing import NamedTuple

import torch
from torch import Tensor

from ttt_kernels import checks
from ttt_kernels.backends import Refusal, refuse_on_cpu, refuse_on_cuda, select
from ttt_kernels.decode import cpu, cuda, reference
from ttt_kernels.decode.layers import LayerWeights, Stack

__all__ = ["Decoded", "LayerWeights", "Stack", "choose", "step"]

BACKENDS = ("cuda", "cpu", "reference")
"""Those that have kernels for `step`."""


class Decoded(NamedTuple):
    """What a token's way through the stack gives."""

    prefix_output: Tensor
    """(B, d), the residual stream after the layers that come before the first fast MLP."""
    hidden: Tensor
    """(B, d), normalized: what the head reads."""
    logits: Tensor
    """(B, V), float32 (float64 for float64)."""


@torch.no_grad()
def step(
    stack: Stack,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    visible: Tensor,
    *,
    backend: str | None = None,
) -> Decoded:
    """Reads one token's embedding per sequence and writes its keys and values into the stack's caches.

    Per layer, with the norms being RMSNorm and queries and keys normalized per head, then rotated by
    interleaved pairs: x += norm(attention(norm(x))); where there is a fast MLP x += norm(fast(norm(x))), with
    each sequence's own weights; x += norm(mlp(norm(x))). What separate operators would return is rounded to
    x's dtype here too, so that decoding agrees with reading many tokens at once.

    Args:
        x: (B, d), of the dtype of the stack's matrices.
        cos, sin: (B, D/2) float32 (float64 for float64), of the angles of each sequence's position.
        visible: (n_layers, 2) int64, on the CPU or on x's device: of each layer the cache row that the token's
            key and value are written to, and how many keys the token sees: rows row + 1 - count to row, its
            own included. Numbers on a GPU are trusted, so that a captured graph can be replayed with others:
            a row outside the cache writes into other memory.

    Raises:
        ValueError: an argument does not fit the stack, or the backend cannot serve the call.
    """
    _check(stack, x, cos, sin, visible)
    return Decoded(*_STEPS[choose(stack, backend)](stack, x, cos, sin, visible))


def choose(stack: Stack, backend: str | None) -> str:
    """The backend that serves a stack's steps; a `ValueError` where it is not the one asked for."""
    refusals: dict[str, Refusal] = {
        "cuda": lambda tensors: refuse_on_cuda(tensors) or cuda.refusal(stack),
        "cpu": lambda tensors: refuse_on_cpu(tensors) or cpu.refusal(stack),
    }
    return select("decode", backend, (stack.head,), refusals)


_STEPS = {"cuda": cuda.step, "cpu": cpu.step, "reference": reference.step}


def _check(stack: Stack, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> None:
    n, d, half = stack.batch_size, stack.hidden_size, stack.head_dim // 2
    if x.shape != (n, d) or x.dtype != stack.head.dtype or x.device != stack.head.device:
        raise ValueError(
            f"decode: x has shape {checks.shape(x)} and dtype {x.dtype} on {x.device}; accepted is {(n, d)}, "
            f"{stack.head.dtype} on {stack.head.device}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, t in (("cos", cos), ("sin", sin)):
        if t.shape != (n, half) or t.dtype != wide or t.device != x.device:
            raise ValueError(
                f"decode: {name} has shape {checks.shape(t)} and dtype {t.dtype} on {t.device}; accepted is "
                f"{(n, half)}, {wide} on {x.device}"
            )
    shape = (len(stack.layers), 2)
    if (
        visible.shape != shape
        or visible.dtype != torch.int64
        or visible.device.type not in ("cpu", x.device.type)
    ):
        raise ValueError(
            f"decode: visible has shape {checks.shape(visible)} and dtype {visible.dtype} on {visible.device}; "
            f"accepted is {shape}, torch.int64 on the CPU or {x.device}"
        )
    if visible.device.type != "cpu":
        return
    for capacity, (row, count) in zip(stack.capacities, visible.tolist(), strict=True):
        if not 1 <= count <= row + 1 <= capacity:
            raise ValueError(
                f"decode: row {row} and count {count} are given for a cache of {capacity} rows; accepted are "
                "a row inside it and a count of 1 to row + 1"
            )
