"""A step of SGD on fast weights, clipped by the global norm of every sequence."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_kernels import checks
from ttt_kernels.backends import refuse_on_cpu
from ttt_kernels.clipped_sgd import cpu, reference, triton
from ttt_kernels.registry import Operator


class ClippedSGD(NamedTuple):
    """What `clipped_sgd` returns.

    Attributes:
        weights: the new weights, as the old ones.
        norm: (B,) the gradients' norm per sequence before clipping, float32 (float64 for float64).
        copies: the new weights in `copy_dtype`, or None.
    """

    weights: tuple[Tensor, ...]
    norm: Tensor
    copies: tuple[Tensor, ...] | None


def _fake(
    weights: list[Tensor],
    grads: list[Tensor],
    lr: Tensor,
    max_norm: float | None,
    copy_dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    first = weights[0]
    norm_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    copies = [] if copy_dtype is None else [w.new_empty(w.shape, dtype=copy_dtype) for w in weights]
    return [w.new_empty(w.shape) for w in weights], first.new_empty(first.shape[:1], dtype=norm_dtype), copies


operator = Operator(
    name="clipped_sgd",
    inputs={"weights": "Tensor[]", "grads": "Tensor[]", "lr": "Tensor"},
    params={"max_norm": "float?", "copy_dtype": "ScalarType?"},
    outputs={"new": "Tensor[]", "norm": "Tensor", "copies": "Tensor[]"},
    saved={},
    differentiable=("weights", "grads", "lr"),
    fake=_fake,
    kernels={
        "reference": {
            "forward": reference.forward,
            "backward": reference.backward,
            "double_backward": reference.double_backward,
        },
        "cpu": {"forward": cpu.forward, "backward": cpu.backward, "double_backward": cpu.double_backward},
        "triton": {
            "forward": triton.forward,
            "backward": triton.backward,
            "double_backward": triton.double_backward,
        },
    },
    refusals={"cpu": refuse_on_cpu, "triton": triton.refuse},
)


def check(
    name: str, weights: Sequence[Tensor], grads: Sequence[Tensor], lr: float | Tensor, max_norm: float | None
) -> Tensor:
    """Checks the arguments of a step, for the error messages of `name`.

    Returns:
        lr as a 0-dim tensor, float64 if it was a number.
    """
    if len(weights) != len(grads) or not weights:
        raise ValueError(
            f"{name}: {len(weights)} weights and {len(grads)} grads; accepted are equally many, at least one"
        )
    named = {f"weights[{i}]": w for i, w in enumerate(weights)}
    named |= {f"grads[{i}]": g for i, g in enumerate(grads)}
    checks.floating(name, **named)
    checks.same_device(name, **named)
    first = weights[0]
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        if w.dim() < 1 or w.shape[0] != first.shape[0] or w.dtype != first.dtype:
            raise ValueError(
                f"{name}: weights[{i}] has shape {checks.shape(w)} and dtype {w.dtype}; accepted are "
                f"(B, ...) with the B and the dtype of weights[0], {checks.shape(first)} and {first.dtype}"
            )
        if g.shape != w.shape or g.dtype != w.dtype:
            raise ValueError(
                f"{name}: grads[{i}] has shape {checks.shape(g)} and dtype {g.dtype}; accepted are those of "
                f"weights[{i}], {checks.shape(w)} and {w.dtype}"
            )
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"{name}: max_norm is {max_norm}; accepted are values above 0, and None")
    if not isinstance(lr, Tensor):
        return torch.tensor(lr, dtype=torch.float64, device="cpu")
    if lr.dim() or not lr.is_floating_point() or lr.device not in (torch.device("cpu"), first.device):
        raise ValueError(
            f"{name}: lr has shape {checks.shape(lr)} and dtype {lr.dtype} on {lr.device}; accepted are a "
            f"float and a floating-point tensor of shape () on the CPU or {first.device}"
        )
    return lr


def clipped_sgd(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    lr: float | Tensor,
    max_norm: float | None = None,
    copy_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> ClippedSGD:
    """One step of SGD per sequence: the inner step of TTT-E2E (arXiv 2512.23675).

    new = W - lr s g, where s = max_norm / n if the global norm n of a sequence's gradients, over the whole
    tuple, is at least max_norm, else 1.

    Args:
        weights: tensors (B, ...) of one floating dtype; computed in float32 (float64 for float64).
        grads: their gradients, of the same shapes and dtype.
        lr: learning rate, a float or a 0-dim floating tensor (which then has a gradient).
        max_norm: threshold of the norm, above 0; None does not clip.
        copy_dtype: also returns the new weights in this dtype, for matrix products; None does not.
        backend: None for the best that can run, or a backend's name.

    Returns:
        `ClippedSGD(weights, norm, copies)`. Differentiable twice with respect to weights, grads and a tensor
        lr (any number of times on the reference backend). At the threshold the derivative is that of
        clipping; at a zero gradient it is that of no clipping, with the norm's own derivative 0. A gradient
        with NaN or infinity gives a norm and weights that show it.

    Raises:
        ValueError: an argument has an unsuitable shape, dtype or device, or the backend cannot serve it.
    """
    weights, grads = list(weights), list(grads)
    rate = check("clipped_sgd", weights, grads, lr, max_norm)
    if copy_dtype is not None and not copy_dtype.is_floating_point:
        raise ValueError(f"clipped_sgd: copy_dtype is {copy_dtype}; accepted are floating dtypes and None")
    threshold = None if max_norm is None else float(max_norm)
    chosen = operator.select(backend, weights, grads, rate)
    new, norm, copies = operator.forward(weights, grads, rate, threshold, copy_dtype, backend=chosen)
    return ClippedSGD(tuple(new), norm, None if copy_dtype is None else tuple(copies))
