"""The step of `clipped_sgd` in place, where no gradient is recorded."""

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from ttt_kernels import checks, tuning
from ttt_kernels.backends import Refusal, refuse_on_cpu, select
from ttt_kernels.clipped_sgd import check, cpu, cuda, reference, triton
from ttt_kernels.triton_launch import on

NAME = "clipped_sgd.update_"
RUN = {"cuda": cuda.update_, "triton": triton.update_, "cpu": cpu.update_, "reference": reference.update_}
"""By backend."""
_REFUSALS: dict[str, Refusal] = {"cuda": cuda.refuse, "triton": triton.refuse, "cpu": refuse_on_cpu}
_PIECE = 4096
"""Elements that are about one piece of work of a kernel."""


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
        backend: None for the best that can run, or a backend's name. On a GPU that both cuda and triton can serve,
            the faster one, which a first call finds out on copies of the weights (`backends()` says which).

    Returns:
        (B,) the gradients' norm per sequence before clipping, float32 (float64 for float64).

    Raises:
        ValueError: an argument is unsuitable or wants a gradient, or the backend cannot serve the call.
    """
    weights, grads, copies = list(weights), list(grads), list(copies) if copies is not None else None
    rate = check(NAME, weights, grads, lr, max_norm)
    written = {f"weights[{i}]": w for i, w in enumerate(weights)}
    if copies is not None:
        if [c.shape for c in copies] != [w.shape for w in weights]:
            raise ValueError(
                f"{NAME}: copies have shapes {[checks.shape(c) for c in copies]}; accepted are the weights' "
                f"{[checks.shape(w) for w in weights]}"
            )
        written |= {f"copies[{i}]": c for i, c in enumerate(copies)}
    checks.floating(NAME, **written)
    checks.same_device(NAME, **written)
    for key, t in written.items():
        if t.numel() and not (t[0].is_contiguous() and (len(t) == 1 or t.stride(0) >= t[0].numel())):
            raise ValueError(
                f"{NAME}: {key} has strides {t.stride()}; accepted are contiguous sequences apart"
            )
    if active is not None and (active.shape != weights[0].shape[:1] or active.dtype != torch.bool):
        raise ValueError(
            f"{NAME}: active has shape {checks.shape(active)} and dtype {active.dtype}; accepted is "
            f"torch.bool of shape ({weights[0].shape[0]},)"
        )
    tensors = (*weights, *grads, *(copies or ()), rate, *(() if active is None else (active,)))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            f"{NAME}: no gradient is recorded; accepted are tensors that want none, or torch.no_grad()"
        )
    threshold = None if max_norm is None else float(max_norm)

    arguments = (weights, grads, rate, threshold, copies)
    chosen = select(NAME, backend, tensors, _REFUSALS, partial(_fastest, arguments))
    return RUN[chosen](*arguments, active)


Arguments = tuple[list[Tensor], list[Tensor], Tensor, float | None, list[Tensor] | None]


def _fastest(arguments: Arguments, names: Sequence[str]) -> str:
    """Which of some backends is, with all sequences active, tried on copies of what the step writes."""
    weights, grads, rate, threshold, copies = arguments
    first = weights[0]

    @cache
    def written() -> tuple[list[Tensor], list[Tensor] | None]:
        return [w.clone() for w in weights], copies and [c.clone() for c in copies]

    def trial(name: str) -> None:
        own_weights, own_copies = written()
        RUN[name](own_weights, grads, rate, threshold, own_copies, None)

    pieces = sum(w.numel() for w in weights) // _PIECE
    key = (first.dtype, copies[0].dtype if copies else None, len(weights), tuning.amount(pieces))
    with on(first.device):
        return tuning.best(NAME, key, names, trial)
