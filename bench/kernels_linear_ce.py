"""`python bench/kernels.py linear_cross_entropy`: the loss of a linear layer, all orders of its gradients."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench import kernel_choice, linear_ce_problem, options
from bench.kernel_contenders import Compiled, Contender, Function, Own, Plain, Work, own
from bench.kernel_problem import Draw, Truth, verdicts
from bench.kernel_rivals import Rival
from bench.linear_ce_problem import CLASSES, IGNORED, ORDERS, ROWS, Problem
from ttt_kernels import linear_cross_entropy
from ttt_kernels.linear_ce import operator

__all__ = ["BEYOND_OUTPUTS", "CEILING", "COLUMN", "ORDERS", "Problem", "own", "verdicts"]

CEILING = "products"
COLUMN = "tokens"
BEYOND_OUTPUTS = True
BASELINES: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("plain", "chunked", "compiled", "liger", "fla")
}
# Compiling for forward and backward takes most of a minute on a CPU of two busy cores.
DEFAULT_BASELINES = {"cpu": ("plain", "chunked")}
contenders = kernel_choice.chooser(operator, BASELINES, DEFAULT_BASELINES)
# Measured on a CPU in float32, rounded up: matrices of all logits that are alive at once.
MATRICES = {"forward": 2, "backward": 3, "forward-backward": 3, "double-backward": 9, "all": 8}


class OwnLoss(Own):
    """This library's operator. What a gradient of x needs is kept only for the orders after forward."""

    orders = ORDERS
    operator = operator

    def params(self, problem: Problem, order: str) -> tuple[Any, ...]:
        return IGNORED, order != "forward"

    def function(self, problem: Problem, x: Draw) -> Function:
        return lambda *arguments: (linear_cross_entropy(*arguments, reduction="none", backend=self.backend),)


class PlainLoss(Plain):
    """torch's product and its loss, all logits at once."""

    orders = ORDERS

    def estimated_bytes(self, problem: Problem, order: str) -> int:
        return MATRICES[order] * problem.logits_bytes()


class CompiledLoss(Compiled, PlainLoss):
    """The same, compiled."""

    orders = ("forward", "backward", "forward-backward")


def formula(problem: Problem) -> Function:
    """torch's product and its loss, the logits in float32 as models have them."""

    def losses(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor]:
        logits = x @ weight.mT
        wide = torch.promote_types(logits.dtype, torch.float32)
        return (functional.cross_entropy(logits.to(wide), target, reduction="none"),)

    return losses


def through_mean(mean: Callable[[Tensor, Tensor, Tensor], Tensor], x: Draw) -> Work:
    """The gradients of a mean loss, whose cotangent is 1: that of every row's loss is 1 / rows, the problem's.

    Such kernels make gradients while they compute the loss, so the two can only be measured together.
    """
    leaves = [t.detach().requires_grad_() for t in x.inputs]
    return lambda: torch.autograd.grad(mean(*leaves, *x.constants), leaves)


class Chunked(Plain):
    """torch's own loss in pieces, which holds no more than some rows' logits."""

    orders = ("forward-backward",)
    # Its gradient of x is off about twice the tolerance in float32 at 8192 classes, whatever its settings.
    leniency = 8.0

    def prepare(self, problem: Problem, x: Draw, order: str) -> Work:
        settings = torch.nn.LinearCrossEntropyOptions()
        return through_mean(
            lambda h, weight, target: functional.linear_cross_entropy(h, weight, target, options=settings), x
        )


class FusedRival(Rival):
    """Another library's loss in pieces; `load` gives its mean."""

    def prepare(self, problem: Problem, x: Draw, order: str) -> Work:
        if order == "forward":
            return super().prepare(problem, x, order)
        return through_mean(self.function(problem, x), x)


def liger(reduction: str) -> Any:
    """Liger's loss, whose sums over rows are float32 as those of the others are."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction, accum_dtype=torch.float32)
    return lambda x, weight, target: loss(weight, x, target)


class Liger(FusedRival):
    """Liger's loss; without gradients also each row's."""

    def prepare(self, problem: Problem, x: Draw, order: str) -> Work:
        if order != "forward":
            return super().prepare(problem, x, order)
        losses = liger("none")
        return torch.no_grad()(lambda: (losses(*x.inputs, *x.constants),))


def fla(problem: Problem) -> Function:
    """fla's loss, which makes gradients even where nobody wants them."""
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

    loss = FusedLinearCrossEntropyLoss()
    return lambda x, weight, target: loss(x, target, weight)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024], metavar="N", help="rows (default: 1024)"
    )
    parser.add_argument("--hidden", type=int, default=768, metavar="N", help="(default: 768)")
    parser.add_argument("--vocab", type=int, default=128256, metavar="N", help="classes (default: 128256)")
    kernel_choice.add_arguments(
        parser,
        f"of {', '.join(BASELINES)}; or all, or none (default: all, but plain and chunked only on a CPU). plain: a "
        "product and torch's loss; chunked: torch's linear_cross_entropy in pieces; compiled: plain by torch.compile; "
        "liger, fla: those packages' kernels, on a GPU. Those in pieces make gradients with the loss: they have "
        "forward-backward, both together, instead of backward",
    )


def problems(args: argparse.Namespace, dtype: str) -> list[Problem]:
    """One for each number of rows; `ValueError` for bad input."""
    options.at_least_one(batch=args.batch, hidden=args.hidden, vocab=args.vocab)
    for count in args.tokens:
        options.at_least_one(tokens=count)
    if args.vocab < 2:
        raise ValueError("--vocab=1 is not accepted; it is at least 2, since one class has no loss")
    counts = sorted({args.batch * count for count in args.tokens})
    return [Problem(count, args.hidden, args.vocab, dtype) for count in counts]


def contender(name: str) -> Contender:
    """The contender of that name."""
    if own(name):
        return OwnLoss(name.partition("/")[2])
    if name == "liger":
        return Liger(name, lambda problem: liger("mean"), ("forward", "forward-backward"))
    if name == "fla":
        return FusedRival(name, fla, ("forward-backward",))
    return {"plain": PlainLoss, "chunked": Chunked, "compiled": CompiledLoss}[name](formula, products=True)


def truths(problem: Problem, orders: Sequence[str]) -> dict[str, dict[str, Truth]]:
    """What is right: few rows and classes whole, and parts of all."""
    return linear_ce_problem.truths(OwnLoss("reference"), problem, orders)


def describe_check(problem: Problem) -> dict[str, int]:
    """How results were compared with float64, for the JSON."""
    short = problem.short()
    return {
        "all_values_at_tokens": short.tokens,
        "all_values_at_vocab": short.vocab,
        "rows_at_full_size": problem.tokens if short == problem else min(ROWS, problem.tokens),
        "classes_at_full_size_at_least": problem.vocab if short == problem else min(CLASSES, problem.vocab),
    }


def title(problem: Problem) -> str:
    """The settings that all sizes share."""
    return f"linear_cross_entropy, {problem.dtype}, rows of {problem.hidden}, {problem.vocab} classes"
