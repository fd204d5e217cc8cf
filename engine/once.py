"""A computation that goes forward without a graph and back by its own means, as a node of autograd."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Sweep(Protocol):
    """Goes forward once, then back once; what it keeps in between goes as it is used."""

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Results of what it is to be differentiated with respect to; no graph is recorded."""

    def backward(self, *cotangents: Tensor | None) -> list[Tensor | None]:
        """Cotangents of what was given from those of the results, None being zero."""


@torch.compiler.disable(reason="its way back is no graph; method='graph' with checkpoint_blocks=False is one")
def swept(sweep: Sweep, *given: Tensor) -> tuple[Tensor, ...]:
    """The results of `sweep`, differentiable once with respect to `given`; a second time raises."""
    results: tuple[Tensor, ...] = _Node.apply(sweep, *given)
    return results


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sweep: Sweep, *given: Tensor) -> tuple[Tensor, ...]:
        # Saved for the check that nobody changes them before the way back.
        ctx.save_for_backward(*given)
        # What nobody uses has no cotangent, and costs nothing.
        ctx.set_materialize_grads(False)
        ctx.sweep = sweep
        return sweep.forward(*given)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "engine: the gradient through the inner loop cannot itself be differentiated (create_graph=True)"
            )
        assert ctx.saved_tensors
        # What it keeps goes as soon as it is used, which a graph that lives on would prevent.
        sweep, ctx.sweep = ctx.sweep, None
        if sweep is None:
            raise RuntimeError("engine: a graph through the inner loop can be taken back only once")
        return None, *sweep.backward(*cotangents)
