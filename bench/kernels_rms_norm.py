"""`python bench/kernels.py rms_norm`: RMSNorm with a residual, all orders of its gradients."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench import kernel_choice, options
from bench.kernel_contenders import Compiled, Contender, Function, Own, Plain, own
from bench.kernel_problem import ORDERS, Draw, Truth, generator, verdicts
from bench.kernel_problem import truths as truths_of
from bench.kernel_rivals import Rival
from engine.config import DTYPES
from ttt_kernels import rms_norm
from ttt_kernels.rms_norm import operator

__all__ = ["BEYOND_OUTPUTS", "CEILING", "COLUMN", "ORDERS", "own", "verdicts"]

CEILING = "copy"
COLUMN = "tokens"
BEYOND_OUTPUTS = False
EPS = 1e-6
CHECK_TOKENS = 256
# Tensors of x's size that are read and written, and how many more with a residual. Backward: dy, x and dx; the
# residual's gradient is dy itself. Second order: dx's cotangent, dy and x; the cotangents of dy and x; with a residual
# that of its gradient.
TENSORS = {"forward": (2, 1), "backward": (3, 0), "double-backward": (5, 1), "all": (10, 2)}
BASELINES: dict[str, tuple[str, ...]] = {name: (name,) for name in ("plain", "compiled", "liger", "fla")}
# Compiling for forward and backward takes most of a minute on a CPU of two busy cores.
DEFAULT_BASELINES = {"cpu": ("plain",)}
contenders = kernel_choice.chooser(operator, BASELINES, DEFAULT_BASELINES)


@dataclass(frozen=True)
class Problem:
    """`batch` sequences of `tokens` rows of `hidden` elements."""

    batch: int
    tokens: int
    hidden: int
    residual: bool
    dtype: str

    @property
    def length(self) -> int:
        return self.tokens

    def bytes(self, order: str) -> int:
        """Useful traffic, without the weight and what is one number a row."""
        always, more = TENSORS[order]
        size = self.batch * self.tokens * self.hidden * DTYPES[self.dtype].itemsize
        return (always + more * self.residual) * size

    def inputs(self, device: torch.device) -> Draw:
        """Standard normal values, and weights about 1."""
        source, dtype = generator(), DTYPES[self.dtype]

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source).to(device, dtype)

        def arguments() -> list[Tensor]:
            shape = (self.batch, self.tokens, self.hidden)
            return [draw(*shape), draw(self.hidden), *([draw(*shape)] if self.residual else [])]

        (x, weight, *residual), upper = arguments(), arguments()
        weight = (1 + 0.1 * weight.float()).to(dtype)
        inputs = (x, weight, *residual)
        curved = (True, True, False)[: len(inputs)]
        return Draw(inputs, (), (draw(*x.shape),), tuple(upper), curved)

    def short(self) -> Problem:
        """The same problem with few tokens."""
        return replace(self, tokens=min(self.tokens, CHECK_TOKENS))


class OwnNorm(Own):
    """This library's operator."""

    operator = operator

    def given(self, x: Draw) -> list[Any]:
        return [*x.inputs, None][:3]

    def g_inputs(self, x: Draw) -> list[Any]:
        return [*x.g_inputs, None][:3]

    def params(self, problem: Problem, order: str) -> tuple[float]:
        return (EPS,)

    def needs(self, x: Draw) -> tuple[bool, ...]:
        return True, True, len(x.inputs) == 3

    def second_needs(self, x: Draw) -> tuple[bool, ...]:
        return True, True, True, False

    def function(self, problem: Problem, x: Draw) -> Function:
        def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor]:
            return (rms_norm(x, weight, eps=EPS, residual=residual, backend=self.backend),)

        return norm


def formula(problem: Problem) -> Function:
    """torch's own norm, and the sum."""

    def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor]:
        y = functional.rms_norm(x, weight.shape, weight, EPS)
        return (y if residual is None else y + residual,)

    return norm


def liger(problem: Problem) -> Function:
    """Liger's kernel, and the sum: its own addition comes before the norm."""
    from liger_kernel.transformers.functional import liger_rms_norm

    def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor]:
        y = liger_rms_norm(x, weight, EPS, in_place=False)
        return (y if residual is None else y + residual,)

    return norm


def fla(problem: Problem) -> Function:
    """fla's kernel, and the sum: its own addition comes before the norm."""
    from fla.modules.layernorm import rms_norm as kernel

    def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor]:
        y = kernel(x, weight, None, eps=EPS)
        return (y if residual is None else y + residual,)

    return norm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[16384], metavar="N", help="of a sequence (default: 16384)"
    )
    parser.add_argument("--hidden", type=int, default=768, metavar="N", help="(default: 768)")
    parser.add_argument(
        "--residual",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add a residual to the norm (default: yes)",
    )
    kernel_choice.add_arguments(
        parser,
        f"of {', '.join(BASELINES)}; or all, or none (default: all, but plain only on a CPU). plain: torch's "
        "rms_norm and a sum; compiled: by torch.compile; liger, fla: those packages' kernels, on a GPU",
    )


def problems(args: argparse.Namespace, dtype: str) -> list[Problem]:
    """One for each number of tokens; `ValueError` for bad input."""
    options.at_least_one(batch=args.batch, hidden=args.hidden)
    for count in args.tokens:
        options.at_least_one(tokens=count)
    counts = sorted(set(args.tokens))
    return [Problem(args.batch, count, args.hidden, args.residual, dtype) for count in counts]


def contender(name: str) -> Contender:
    """The contender of that name."""
    if own(name):
        return OwnNorm(name.partition("/")[2])
    rivals = {"liger": liger, "fla": fla}
    if name in rivals:
        return Rival(name, rivals[name])
    return {"plain": Plain, "compiled": Compiled}[name](formula, products=False)


def truths(problem: Problem, orders: Sequence[str]) -> dict[str, dict[str, Truth]]:
    """What is right, whole, of few tokens and of all."""
    return truths_of(OwnNorm("reference"), problem, orders)


def describe_check(problem: Problem) -> dict[str, int]:
    """How results were compared with float64, for the JSON."""
    return {"all_values_at_tokens": problem.tokens}


def title(problem: Problem) -> str:
    """The settings that all sizes share."""
    residual = "with a residual" if problem.residual else "no residual"
    return f"rms_norm, {problem.dtype}, batch {problem.batch}, rows of {problem.hidden}, {residual}"
