"""`python bench/kernels.py swiglu`: the gated MLP, all orders of its gradients."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import silu

from bench import kernel_choice, options
from bench.kernel_contenders import Compiled, Contender, Function, Own, Plain, own
from bench.kernel_problem import ORDERS, Draw, Truth, generator, verdicts
from bench.kernel_problem import truths as truths_of
from bench.kernel_rivals import Rival, of_one
from engine.config import DTYPES
from ttt_kernels import swiglu
from ttt_kernels.swiglu import operator

__all__ = ["BEYOND_OUTPUTS", "CEILING", "COLUMN", "ORDERS", "own", "verdicts"]

CEILING = "products"
COLUMN = "tokens"
BEYOND_OUTPUTS = False
# Forward G, U, y. Backward dH, and two for x, one for each matrix. The second order with every cotangent given: two
# each for the tangents of G and U, one for H's cotangent, two for y's, four for x's, two each for those of Wg and Wu,
# one for Wd's. Products of an earlier order that are made again are not useful.
PRODUCTS = {"forward": 3, "backward": 6, "double-backward": 16, "all": 25}
CHECK_TOKENS = 256
BASELINES: dict[str, tuple[str, ...]] = {name: (name,) for name in ("plain", "compiled", "liger", "fla")}
# Compiling for forward and backward takes most of a minute on a CPU of two busy cores.
DEFAULT_BASELINES = {"cpu": ("plain",)}
contenders = kernel_choice.chooser(operator, BASELINES, DEFAULT_BASELINES)


@dataclass(frozen=True)
class Problem:
    """A gated MLP of `batch` sequences of `tokens`; with `grouped` weights each sequence has its own."""

    batch: int
    tokens: int
    hidden: int
    intermediate: int
    grouped: bool
    dtype: str

    @property
    def length(self) -> int:
        return self.tokens

    def flops(self, order: str) -> int:
        """Useful operations, two per multiply-add."""
        return PRODUCTS[order] * 2 * self.batch * self.tokens * self.hidden * self.intermediate

    def inputs(self, device: torch.device) -> Draw:
        """Standard normal values, those of matrices such that products have them too."""
        source, dtype = generator(), DTYPES[self.dtype]
        d, i = self.hidden, self.intermediate

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=source)).to(device, dtype)

        def arguments() -> tuple[Tensor, ...]:
            own_batch = (self.batch,) if self.grouped else ()
            return (
                draw(self.batch, self.tokens, d),
                *(draw(*own_batch, i, d, scale=d**-0.5) for _ in range(2)),
                draw(*own_batch, d, i, scale=i**-0.5),
            )

        inputs, upper = arguments(), arguments()
        return Draw(inputs, (), (draw(self.batch, self.tokens, d),), upper, (True,) * 4)

    def short(self) -> Problem:
        """The same problem with few tokens."""
        return replace(self, tokens=min(self.tokens, CHECK_TOKENS))


class OwnSwiglu(Own):
    """This library's operator."""

    operator = operator

    def function(self, problem: Problem, x: Draw) -> Function:
        return lambda *arguments: (swiglu(*arguments, backend=self.backend),)


def formula(problem: Problem) -> Function:
    """The MLP as most models have it."""

    def mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor]:
        return ((silu(x @ w_gate.mT) * (x @ w_up.mT)) @ w_down.mT,)

    return mlp


def liger(problem: Problem) -> Function:
    """Liger's kernel is what stands between the products."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return of_one(lambda x, gate, up, down: LigerSiLUMulFunction.apply(x @ gate.mT, x @ up.mT) @ down.mT)


def fla(problem: Problem) -> Function:
    """fla has the same, and keeps less for the backward with the last product inside."""
    from fla.modules.activations import swiglu as between
    from fla.modules.activations import swiglu_linear

    if problem.grouped:
        return of_one(lambda x, gate, up, down: between(x @ gate.mT, x @ up.mT) @ down.mT)
    return of_one(lambda x, gate, up, down: swiglu_linear(x @ gate.mT, x @ up.mT, down, None))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024], metavar="N", help="of a sequence (default: 1024)"
    )
    parser.add_argument("--hidden", type=int, default=768, metavar="N", help="d (default: 768)")
    parser.add_argument("--intermediate", type=int, default=1664, metavar="N", help="i (default: 1664)")
    parser.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="as many sequences, each with weights of its own, instead of --batch (default: shared weights)",
    )
    kernel_choice.add_arguments(
        parser,
        f"of {', '.join(BASELINES)}; or all, or none (default: all, but plain only on a CPU). plain: the formula in "
        "torch; compiled: by torch.compile; liger, fla: those packages' kernels, on a GPU",
    )


def problems(args: argparse.Namespace, dtype: str) -> list[Problem]:
    """One for each number of tokens; `ValueError` for bad input."""
    options.at_least_one(
        batch=args.batch, hidden=args.hidden, intermediate=args.intermediate, sequences=args.sequences
    )
    for count in args.tokens:
        options.at_least_one(tokens=count)
    if args.sequences is not None and args.batch != 1:
        raise ValueError(f"--sequences={args.sequences} stands instead of --batch={args.batch}")
    batch = args.sequences or args.batch
    sizes = (args.hidden, args.intermediate, args.sequences is not None)
    return [Problem(batch, count, *sizes, dtype) for count in sorted(set(args.tokens))]


def contender(name: str) -> Contender:
    """The contender of that name."""
    if own(name):
        return OwnSwiglu(name.partition("/")[2])
    rivals = {"liger": liger, "fla": fla}
    if name in rivals:
        return Rival(name, rivals[name])
    return {"plain": Plain, "compiled": Compiled}[name](formula, products=True)


def truths(problem: Problem, orders: Sequence[str]) -> dict[str, dict[str, Truth]]:
    """What is right, whole, of few tokens and of all."""
    return truths_of(OwnSwiglu("reference"), problem, orders)


def describe_check(problem: Problem) -> dict[str, int]:
    """How results were compared with float64, for the JSON."""
    return {"all_values_at_tokens": problem.tokens}


def title(problem: Problem) -> str:
    """The settings that all sizes share."""
    weights = "weights of each sequence" if problem.grouped else "shared weights"
    return f"swiglu, {problem.dtype}, batch {problem.batch}, {problem.hidden} to {problem.intermediate}, {weights}"
