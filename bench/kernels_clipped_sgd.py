"""`python bench/kernels.py clipped_sgd`: the clipped step on fast weights, all orders of its gradients."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from bench import kernel_choice, options
from bench.kernel_contenders import Compiled, Contender, Function, Own, Plain, own
from bench.kernel_problem import ORDERS, Draw, Truth, generator, verdicts
from bench.kernel_problem import truths as truths_of
from engine.config import DTYPES
from ttt_kernels import clipped_sgd
from ttt_kernels.clipped_sgd import operator

__all__ = ["BEYOND_OUTPUTS", "CEILING", "COLUMN", "ORDERS", "own", "verdicts"]

CEILING = "copy"
COLUMN = "weights"
BEYOND_OUTPUTS = False
LR = 1.0
MAX_NORM = 1.0
# Of the weights' size, in two passes: whatever an order writes needs sums over all that it reads. Forward: gradients;
# then weights, gradients and the new weights. Backward: gradients and the new weights' cotangent, which is the weights'
# too; then both, and the gradients' cotangent. Second order: gradients, the new weights' cotangent and the cotangent of
# the gradients' cotangent; then these, the cotangent of the weights', and the two results.
TENSORS = {"forward": 4, "backward": 5, "double-backward": 9, "all": 18}
CHECK_HIDDEN = 64
BASELINES: dict[str, tuple[str, ...]] = {name: (name,) for name in ("plain", "compiled")}
# Compiling for forward and backward takes most of a minute on a CPU of two busy cores.
DEFAULT_BASELINES = {"cpu": ("plain",)}
contenders = kernel_choice.chooser(operator, BASELINES, DEFAULT_BASELINES)


@dataclass(frozen=True)
class Problem:
    """The fast weights of `blocks` blocks for each of `batch` sequences; the gradients are twice the threshold."""

    batch: int
    blocks: int
    hidden: int
    intermediate: int
    dtype: str

    @property
    def length(self) -> int:
        """Elements of a sequence."""
        return 3 * self.blocks * self.hidden * self.intermediate

    def bytes(self, order: str) -> int:
        """Traffic of two passes over what is larger than caches."""
        return TENSORS[order] * self.batch * self.length * DTYPES[self.dtype].itemsize

    def inputs(self, device: torch.device) -> Draw:
        """Weights as a model begins with, gradients that are clipped, standard normal cotangents."""
        source, dtype = generator(), DTYPES[self.dtype]
        d, i = self.hidden, self.intermediate

        def draw(scale: float = 1.0) -> list[Tensor]:
            shapes = [(i, d), (i, d), (d, i)] * self.blocks
            drawn = (scale * torch.randn(self.batch, *shape, generator=source) for shape in shapes)
            return [t.to(device, dtype) for t in drawn]

        inputs = (*draw(0.02), *draw(2 * MAX_NORM * self.length**-0.5))
        curved = (False,) * (len(inputs) // 2) + (True,) * (len(inputs) // 2)
        return Draw(inputs, (), tuple(draw()), (*draw(), *draw()), curved)

    def short(self) -> Problem:
        """The same problem with small matrices."""
        return replace(
            self, hidden=min(self.hidden, CHECK_HIDDEN), intermediate=min(self.intermediate, 2 * CHECK_HIDDEN)
        )


class OwnStep(Own):
    """This library's operator; the norm that it returns too is not differentiated."""

    operator = operator

    def given(self, x: Draw) -> list[Any]:
        return [*halves(x.inputs), torch.tensor(LR, dtype=torch.float64)]

    def d_outputs(self, x: Draw) -> list[Any]:
        first = x.inputs[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        return [list(x.d_outputs), torch.zeros(len(first), dtype=wide, device=first.device), []]

    def g_inputs(self, x: Draw) -> list[Any]:
        return [*halves(x.g_inputs), None]

    def params(self, problem: Problem, order: str) -> tuple[Any, ...]:
        return MAX_NORM, None

    def needs(self, x: Draw) -> tuple[bool, ...]:
        return True, True, False

    def second_needs(self, x: Draw) -> tuple[bool, ...]:
        return True, False, False, False, True, False

    def function(self, problem: Problem, x: Draw) -> Function:
        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            weights, grads = halves(inputs)
            return clipped_sgd(weights, grads, lr=LR, max_norm=MAX_NORM, backend=self.backend).weights

        return step


def halves(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients, or what belongs to them."""
    count = len(tensors) // 2
    return list(tensors[:count]), list(tensors[count:])


def formula(problem: Problem) -> Function:
    """The step per sequence with as few passes over memory as torch's functions need."""

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        weights, grads = halves(inputs)
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        norms = torch.stack([vector_norm(g.flatten(1), dim=1, dtype=wide) for g in grads])
        scale = (MAX_NORM / vector_norm(norms, dim=0)).clamp(max=1)
        factor = scale[:, None, None].to(grads[0].dtype)
        return tuple(
            torch.addcmul(w, g, factor.expand_as(g), value=-LR) for w, g in zip(weights, grads, strict=True)
        )

    return step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--blocks", type=int, default=3, metavar="N", help="blocks with fast weights (default: 3)"
    )
    parser.add_argument("--hidden", type=int, default=768, metavar="N", help="d (default: 768)")
    parser.add_argument("--intermediate", type=int, default=1664, metavar="N", help="i (default: 1664)")
    kernel_choice.add_arguments(
        parser,
        f"of {', '.join(BASELINES)}; or all, or none (default: all, but plain only on a CPU). plain: torch's norms and "
        "addcmul; compiled: by torch.compile",
    )


def problems(args: argparse.Namespace, dtype: str) -> list[Problem]:
    """The one that was asked for; `ValueError` for bad input."""
    sizes = {"batch": args.batch, "blocks": args.blocks}
    sizes |= {"hidden": args.hidden, "intermediate": args.intermediate}
    options.at_least_one(**sizes)
    return [Problem(**sizes, dtype=dtype)]


def contender(name: str) -> Contender:
    """The contender of that name."""
    if own(name):
        return OwnStep(name.partition("/")[2])
    return {"plain": Plain, "compiled": Compiled}[name](formula, products=False)


def truths(problem: Problem, orders: Sequence[str]) -> dict[str, dict[str, Truth]]:
    """What is right, whole, of small matrices and of all."""
    return truths_of(OwnStep("reference"), problem, orders, Plain(formula, products=False))


def describe_check(problem: Problem) -> dict[str, int]:
    """How results were compared with float64, for the JSON."""
    return {"all_values_of_weights": problem.length}


def title(problem: Problem) -> str:
    """The settings."""
    blocks = f"{problem.blocks} blocks of 3 matrices {problem.hidden} x {problem.intermediate}"
    return f"clipped_sgd, {problem.dtype}, batch {problem.batch}, {blocks}"
