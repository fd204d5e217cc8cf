"""The step of `clipped_sgd` in place, where no gradient is recorded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels import checks
from ttt_kernels.backends import refuse_on_cpu, select
from ttt_kernels.clipped_sgd import check, cpu, reference, triton


def update_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    lr: float | Tensor,
    max_norm: float | None = None,
    copies: Sequence[Tensor] | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Writes `clipped_sgd`'s new weights over the old ones, and into their copies.

    Args:
        weights: tensors (B, ...) of one floating dtype, contiguous within a sequence.
        grads: their gradients, of the same shapes and dtype.
        lr: learning rate, a float or a 0-dim floating tensor.
        max_norm: threshold of the norm, above 0; None does not clip.
        copies: tensors of the weights' shapes in a floating dtype, contiguous within a sequence, that receive
            the new weights; None for none.
        active: (B,) bool; a sequence that is not keeps its weights and copies. None: all are.
        backend: None for the best that can run, or a backend's name.

    Returns:
        (B,) the gradients' norm per sequence before clipping, float32 (float64 for float64).

    Raises:
        ValueError: an argument is unsuitable or wants a gradient, or the backend cannot serve the call.
    """
    name = "clipped_sgd.update_"
    weights, grads, copies = list(weights), list(grads), list(copies) if copies is not None else None
    rate = check(name, weights, grads, lr, max_norm)
    written = {f"weights[{i}]": w for i, w in enumerate(weights)}
    if copies is not None:
        if [c.shape for c in copies] != [w.shape for w in weights]:
            raise ValueError(
                f"{name}: copies have shapes {[checks.shape(c) for c in copies]}; accepted are the weights' "
                f"{[checks.shape(w) for w in weights]}"
            )
        written |= {f"copies[{i}]": c for i, c in enumerate(copies)}
    checks.floating(name, **written)
    checks.same_device(name, **written)
    for key, t in written.items():
        if t.numel() and not (t[0].is_contiguous() and (len(t) == 1 or t.stride(0) >= t[0].numel())):
            raise ValueError(
                f"{name}: {key} has strides {t.stride()}; accepted are contiguous sequences apart"
            )
    if active is not None and (active.shape != weights[0].shape[:1] or active.dtype != torch.bool):
        raise ValueError(
            f"{name}: active has shape {checks.shape(active)} and dtype {active.dtype}; accepted is "
            f"torch.bool of shape ({weights[0].shape[0]},)"
        )
    tensors = (*weights, *grads, *(copies or ()), rate, *(() if active is None else (active,)))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            f"{name}: no gradient is recorded; accepted are tensors that want none, or torch.no_grad()"
        )
    chosen = select(name, backend, tensors, {"cpu": refuse_on_cpu, "triton": triton.refuse})
    run = {"reference": reference.update_, "cpu": cpu.update_, "triton": triton.update_}[chosen]
    return run(weights, grads, rate, None if max_norm is None else float(max_norm), copies, active)
