"""`python bench/kernels.py rope`: rotary position embedding, all orders of its gradient."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench import kernel_choice, options
from bench.kernel_contenders import Compiled, Contender, Function, Own, Plain, own
from bench.kernel_problem import ORDERS, Draw, Truth, generator, verdicts
from bench.kernel_problem import truths as truths_of
from bench.kernel_rivals import Rival, of_one
from engine.config import DTYPES
from ttt_kernels import rope
from ttt_kernels.rope import operator
from ttt_kernels.rope.tables import tables

__all__ = ["BEYOND_OUTPUTS", "CEILING", "COLUMN", "ORDERS", "own", "verdicts"]

CEILING = "copy"
COLUMN = "tokens"
BEYOND_OUTPUTS = False
THETA = 500_000.0
CHECK_TOKENS = 256
# Every order turns one tensor into another.
TENSORS = {"forward": 2, "backward": 2, "double-backward": 2, "all": 6}
BASELINES: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("plain", "complex", "compiled", "liger", "fla")
}
# Compiling for forward and backward takes most of a minute on a CPU of two busy cores.
DEFAULT_BASELINES = {"cpu": ("plain", "complex")}
contenders = kernel_choice.chooser(operator, BASELINES, DEFAULT_BASELINES)


@dataclass(frozen=True)
class Problem:
    """`batch` sequences of `tokens`, each with `heads` of `head_dim` elements, turned in neighbouring pairs."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str

    @property
    def length(self) -> int:
        return self.tokens

    def bytes(self, order: str) -> int:
        """Useful traffic, without the tables of cosines and sines."""
        size = self.batch * self.tokens * self.heads * self.head_dim * DTYPES[self.dtype].itemsize
        return TENSORS[order] * size

    def inputs(self, device: torch.device) -> Draw:
        """Standard normal values at the positions from 0 on."""
        source = generator()

        def draw() -> tuple[Tensor]:
            shape = (self.batch, self.tokens, self.heads, self.head_dim)
            return (torch.randn(shape, generator=source).to(device, DTYPES[self.dtype]),)

        return Draw(draw(), (torch.arange(self.tokens),), draw(), draw(), (False,))

    def short(self) -> Problem:
        """The same problem with few tokens."""
        return replace(self, tokens=min(self.tokens, CHECK_TOKENS))


class OwnRope(Own):
    """This library's operator."""

    operator = operator

    def params(self, problem: Problem, order: str) -> tuple[Any, ...]:
        return THETA, True

    def function(self, problem: Problem, x: Draw) -> Function:
        return lambda x, positions: (rope(x, positions, theta=THETA, backend=self.backend),)


class Tabled(Plain):
    """A formula given cosines and sines, (T, 1, D/2), which a model makes once for all its layers."""

    def arrange(self, x: Draw) -> Draw:
        (positions,), (t,) = x.constants, x.inputs
        dtype = torch.promote_types(t.dtype, torch.float32)
        made = tables(positions, t.shape[-1], THETA, dtype)
        return x._replace(constants=tuple(table[:, None].to(t.device) for table in made))


class CompiledRope(Compiled, Tabled):
    """A formula given cosines and sines, compiled."""


def formula(problem: Problem) -> Function:
    """The rotation as it is written."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
        return (turned.flatten(-2).to(x.dtype),)

    return turn


def complex_formula(problem: Problem) -> Function:
    """The rotation as Llama's own code has it: a product of complex numbers."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
        pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)))
        return (torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype),)

    return turn


class Liger(Contender):
    """Turns halves of a head instead of neighbours, over the input's own memory: another operator."""

    orders = ("forward", "backward")

    def refusal(self, problem: Problem) -> str:
        return "it turns the halves of a head, in place; here pairs are neighbours, and the input stays"


def fla(problem: Problem) -> Function:
    """fla's kernel, whose tables have the input's dtype."""
    from fla.modules.rotary import rotary_embedding

    return of_one(
        lambda x, cos, sin: rotary_embedding(
            x, cos.squeeze(1).to(x.dtype), sin.squeeze(1).to(x.dtype), interleaved=True
        )
    )


class Fla(Rival, Tabled):
    """fla's kernel, given tables."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[16384], metavar="N", help="of a sequence (default: 16384)"
    )
    parser.add_argument("--heads", type=int, default=12, metavar="N", help="(default: 12)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N", help="(default: 64)")
    kernel_choice.add_arguments(
        parser,
        f"of {', '.join(BASELINES)}; or all, or none (default: all, but plain and complex only on a CPU). plain: "
        "cosines, sines and a stack; complex: a product of complex numbers; compiled: plain by torch.compile; "
        "liger, fla: those packages' kernels, on a GPU",
    )


def problems(args: argparse.Namespace, dtype: str) -> list[Problem]:
    """One for each number of tokens; `ValueError` for bad input."""
    options.at_least_one(batch=args.batch, heads=args.heads, head_dim=args.head_dim)
    for count in args.tokens:
        options.at_least_one(tokens=count)
    if args.head_dim % 2:
        raise ValueError(f"--head-dim={args.head_dim} is not accepted; it is even")
    sizes = (args.heads, args.head_dim)
    return [Problem(args.batch, count, *sizes, dtype) for count in sorted(set(args.tokens))]


def contender(name: str) -> Contender:
    """The contender of that name."""
    if own(name):
        return OwnRope(name.partition("/")[2])
    if name == "liger":
        return Liger()
    if name == "fla":
        return Fla(name, fla)
    if name == "compiled":
        return CompiledRope(formula, products=False)
    return Tabled({"plain": formula, "complex": complex_formula}[name], products=False)


def truths(problem: Problem, orders: Sequence[str]) -> dict[str, dict[str, Truth]]:
    """What is right, whole, of few tokens and of all."""
    return truths_of(OwnRope("reference"), problem, orders)


def describe_check(problem: Problem) -> dict[str, int]:
    """How results were compared with float64, for the JSON."""
    return {"all_values_at_tokens": problem.tokens}


def title(problem: Problem) -> str:
    """The settings that all sizes share."""
    return f"rope, {problem.dtype}, batch {problem.batch}, {problem.heads} heads of {problem.head_dim}"
