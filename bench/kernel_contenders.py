"""Who computes an operator: this library's backends, plain PyTorch, and PyTorch compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.kernel_problem import ORDERS, Draw
from ttt_kernels.matmul import operand
from ttt_kernels.registry import Operator

Function = Callable[..., tuple[Tensor, ...]]
"""An operator's outputs, of its inputs and constants."""
Work = Callable[[], tuple[Tensor, ...]]
OWN = "ttt_kernels/"


def own(name: str) -> bool:
    """Whether the contender of that name is this library's."""
    return name.startswith(OWN)


class Contender:
    """A way to compute an operator, as a function that autograd differentiates."""

    orders: tuple[str, ...] = ORDERS
    compiled = False
    """Whether the first call at a shape compiles."""
    leniency = 1.0
    """How many times more than others a baseline may be off, where leaving it out would flatter this library."""

    def arrange(self, x: Any) -> Any:
        """The inputs as it takes them."""
        return x

    def rearrange(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Its results as the truth has them."""
        return results

    def refusal(self, problem: Any) -> str | None:
        """Why there is nothing to measure, or None."""
        return None

    def estimated_bytes(self, problem: Any, order: str) -> int:
        """Memory beyond the inputs, where it grows out of proportion to them; else 0."""
        return 0

    def function(self, problem: Any, x: Any) -> Function:
        """The operator, with all that a user makes once beforehand."""
        raise NotImplementedError

    def prepare(self, problem: Any, x: Any, order: str) -> Work:
        """The work of an order; what earlier orders keep for it is there already."""
        return by_autograd(self.function(problem, x), x, order)


def by_autograd(function: Function, x: Draw, order: str) -> Work:
    """An order's work through torch.autograd.grad."""
    if order == "forward":
        return torch.no_grad()(lambda: function(*x.inputs, *x.constants))
    leaves = [t.detach().requires_grad_() for t in x.inputs]
    if order == "forward-backward":
        return lambda: torch.autograd.grad(function(*leaves, *x.constants), leaves, x.d_outputs)
    if order == "backward":
        outputs = function(*leaves, *x.constants)
        return lambda: torch.autograd.grad(outputs, leaves, x.d_outputs, retain_graph=True)
    d_outputs = [t.detach().requires_grad_() for t in x.d_outputs]
    sources = [*d_outputs, *(leaf for leaf, curved in zip(leaves, x.curved, strict=True) if curved)]

    def gradients() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        outputs = function(*leaves, *x.constants)
        return outputs, torch.autograd.grad(outputs, leaves, d_outputs, create_graph=True)

    def second(first: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(first, sources, x.g_inputs, retain_graph=keep)

    if order == "double-backward":
        _, kept = gradients()
        return lambda: second(kept, True)

    def everything() -> tuple[Tensor, ...]:
        outputs, first = gradients()
        return tuple(t.detach() for t in (*outputs, *first, *second(first, False)))

    return everything


class Own(Contender):
    """This library on one backend; single orders by the kernels themselves, what is together through autograd."""

    operator: Operator

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def given(self, x: Draw) -> list[Any]:
        """The arguments of the kernels' forward, without parameters."""
        return [*x.inputs, *x.constants]

    def d_outputs(self, x: Draw) -> list[Any]:
        """Cotangents of the outputs, as kernels take them."""
        return list(x.d_outputs)

    def g_inputs(self, x: Draw) -> list[Any]:
        """Cotangents of the gradients, as kernels take them."""
        return list(x.g_inputs)

    def params(self, problem: Any, order: str) -> tuple[Any, ...]:
        """The parameters that forward and the orders after it are given."""
        return ()

    def needs(self, x: Draw) -> tuple[bool, ...]:
        """Which gradients are wanted."""
        return (True,) * len(x.inputs)

    def second_needs(self, x: Draw) -> tuple[bool, ...]:
        """Which second cotangents are wanted."""
        return (True,) * len(x.d_outputs) + x.curved

    def prepare(self, problem: Any, x: Draw, order: str) -> Work:
        if order not in ORDERS[:3]:
            return super().prepare(problem, x, order)
        op, given, params, backend = self.operator, self.given(x), self.params(problem, order), self.backend
        assert not op.keeps
        if order == "forward":
            return lambda: flat(op.forward(*given, *params, backend=backend)[:1])
        saved = op.forward(*given, *params, backend=backend)[len(op.outputs) :]
        d_outputs = self.d_outputs(x)
        if order == "backward":
            arguments, needs = (*d_outputs, *given, *saved, *params), self.needs(x)
            return lambda: flat(op.backward(*arguments, needs=needs, backend=backend))
        kernel = (op.kernels["reference"] | op.kernels[backend])["double_backward"]
        arguments = (*self.g_inputs(x), *d_outputs, *given, *saved, *params, list(self.second_needs(x)))
        return lambda: flat(kernel(*arguments))


def flat(results: Any) -> tuple[Tensor, ...]:
    """The tensors among a kernel's results, those in lists included."""
    values = (v for r in results for v in (r if isinstance(r, list | tuple) else (r,)))
    return tuple(v for v in values if v is not None)


class Plain(Contender):
    """The formula as a user of torch writes it, differentiated by autograd."""

    def __init__(self, formula: Callable[[Any], Function], products: bool) -> None:
        self.formula = formula
        self.products = products

    def arrange(self, x: Draw) -> Draw:
        # On a processor without 16-bit products whoever wants speed keeps everything in float32.
        return x.each(operand) if self.products else x

    def function(self, problem: Any, x: Draw) -> Function:
        return self.formula(problem)


class Compiled(Plain):
    """The same, compiled by torch.compile, whose code cannot be differentiated twice."""

    orders = ("forward", "backward")
    compiled = True

    def __init__(self, formula: Callable[[Any], Function], products: bool) -> None:
        super().__init__(formula, products)
        self.made: dict[Any, Function] = {}

    def function(self, problem: Any, x: Draw) -> Function:
        if problem not in self.made:
            self.made[problem] = torch.compile(self.formula(problem), dynamic=False)
        return self.made[problem]
