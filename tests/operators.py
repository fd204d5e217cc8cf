"""Every registered operator with an example, for the promises that all of them make (test_every_operator.py).

A new operator adds its example here; what is special to it is tested in a file of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import EVERY_BACKEND, draw
from torch import Tensor

from ttt_kernels.registry import OPERATORS, Operator

KERNELS = tuple(name for name in EVERY_BACKEND if name != "reference")


def flat(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among values and lists of them."""
    return [t for v in values if v is not None for t in (v if isinstance(v, list | tuple) else [v])]


@dataclass(frozen=True)
class Example:
    """One call of an operator.

    Attributes:
        operator: the registered operator.
        inputs: values of all its inputs, floating tensors in float64.
        params: values of all its parameters.
    """

    operator: Operator
    inputs: tuple[Any, ...]
    params: tuple[Any, ...]

    @property
    def positions(self) -> list[int]:
        """Where the differentiable inputs are that are given."""
        names = list(self.operator.inputs)
        return [i for i in map(names.index, self.operator.differentiable) if self.inputs[i] is not None]

    def leaves(self) -> list[Tensor]:
        """The tensors that have gradients."""
        return flat([self.inputs[i] for i in self.positions])

    def given(self, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
        """The inputs with other tensors for the leaves."""
        rest, given = list(leaves), list(self.inputs)
        for i in self.positions:
            many = isinstance(given[i], list)
            count = len(given[i]) if many else 1
            given[i], rest = (rest[:count] if many else rest[0]), rest[count:]
        return tuple(given)

    def on(self, backend: str) -> Callable[..., list[Tensor]]:
        """The operator as a function of the leaves, giving all outputs."""

        def call(*leaves: Tensor) -> list[Tensor]:
            results = self.operator.forward(*self.given(leaves), *self.params, backend=backend)
            return flat(results[: len(self.operator.outputs)])

        return call

    def cast(self, dtype: torch.dtype) -> "Example":
        """The same with tensors of another dtype."""
        given = [
            [t.to(dtype) for t in v]
            if isinstance(v, list)
            else v.to(dtype)
            if isinstance(v, Tensor) and v.is_floating_point()
            else v
            for v in self.inputs
        ]
        return Example(self.operator, tuple(given), self.params)

    def arguments(self, order: str) -> list[Any]:
        """Positional arguments of an order's kernels, by the reference, but for `needs`."""
        if order == "forward":
            return [*self.inputs, *self.params]
        count = len(self.operator.outputs)
        results = self.operator.kernels["reference"]["forward"](*self.inputs, *self.params)
        kept = [results[list(self.operator.outputs).index(name)] for name in self.operator.keeps]
        d_outputs = [_like(r, 50 + i) for i, r in enumerate(results[:count])]
        backward = [*d_outputs, *self.inputs, *kept, *results[count:], *self.params]
        if order == "backward":
            return backward
        return [*self.cotangents(), *backward]

    def cotangents(self) -> list[Any]:
        """Cotangents of all gradients."""
        names = list(self.operator.inputs)
        differentiable = [self.inputs[names.index(name)] for name in self.operator.differentiable]
        return [None if v is None else _like(v, 70 + 5 * i) for i, v in enumerate(differentiable)]

    def carried(self) -> list[Tensor]:
        """Cotangents of the saved values that have their own."""
        results = self.operator.kernels["reference"]["forward"](*self.inputs, *self.params)
        saved = results[len(self.operator.outputs) :]
        names = list(self.operator.saved)
        return [_like(saved[names.index(name)], 90 + i) for i, name in enumerate(self.operator.carries)]

    def wanted(self, order: str) -> list[bool]:
        """`needs` for all results that there are."""
        names = list(self.operator.inputs)
        gradients = [self.inputs[names.index(name)] is not None for name in self.operator.differentiable]
        return gradients if order == "backward" else [True] * len(self.operator.outputs) + gradients


def _like(value: Any, seed: int) -> Any:
    if isinstance(value, list | tuple):
        return [_like(v, seed + i) for i, v in enumerate(value)]
    return draw(*value.shape, seed=seed).to(value.dtype)


def _draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    return [draw(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


def _with_tangents(name: str, example: Example, params: tuple[Any, ...]) -> Example:
    names = list(example.operator.inputs)
    given = [example.inputs[names.index(n)] for n in example.operator.differentiable]
    dots = [None if v is None else _like(v, 30 + i) for i, v in enumerate(given)]
    return Example(OPERATORS[f"{name}_jvp"], (*example.inputs, *dots), params)


def _with_last_tangents(example: Example, start: int) -> Example:
    """Attention with tangents of the keys and values from `start` on."""
    *given, q_dot, k_dot, v_dot = _with_tangents("swa", example, ()).inputs
    return Example(OPERATORS["swa_jvp"], (*given, q_dot, k_dot[:, start:], v_dot[:, start:]), (4, 0.4, start))


def _examples() -> dict[str, Example]:
    attention = _draw((1, 5, 2, 4), (1, 8, 1, 4), (1, 8, 1, 4))
    lengths = torch.tensor([7])
    mlp = [t * 0.5 for t in _draw((2, 3, 4), (2, 6, 4), (2, 6, 4), (2, 4, 6))]
    head = (*_draw((5, 3), (11, 3)), torch.tensor([0, 10, -100, 7, 7]))
    fast = [_draw((2, 3, 4), (2, 7), seed=s) for s in (0, 5)]
    rate = torch.tensor(0.3, dtype=torch.float64)
    normed = _draw((3, 2, 10), (10,), (3, 2, 10))
    of = OPERATORS
    examples = {
        "swa": Example(of["swa"], (*attention, lengths, None), (4, 0.4, 0, True)),
        "swiglu": Example(of["swiglu"], tuple(mlp), ()),
        "swiglu shared": Example(of["swiglu"], (mlp[0], *(t[0] for t in mlp[1:])), ()),
        "linear_ce": Example(of["linear_ce"], head, (-100, True)),
        "linear_ce_slope": Example(of["linear_ce_slope"], (*head, []), (-100, True)),
        "rms_norm": Example(of["rms_norm"], (*normed[:2], None), (1e-2,)),
        "rms_norm residual": Example(of["rms_norm"], tuple(normed), (1e-2,)),
        "rope": Example(of["rope"], (draw(2, 3, 2, 6, seed=0), torch.tensor([0, 5, 10**6])), (1e4, True)),
        "rope halves": Example(of["rope"], (draw(2, 3, 2, 6, seed=0), torch.arange(6).view(2, 3)), (1e4, False)),
        "clipped_sgd": Example(of["clipped_sgd"], (*fast, rate), (2.0, None)),
        "clipped_sgd unclipped": Example(of["clipped_sgd"], (*fast, rate), (100.0, torch.bfloat16)),
    }  # fmt: skip
    return examples | {
        "swa_jvp": _with_tangents("swa", examples["swa"], (4, 0.4, 0)),
        "swa_jvp of the last keys": _with_last_tangents(examples["swa"], 3),
        "swiglu_jvp": _with_tangents("swiglu", examples["swiglu"], ()),
        "linear_ce_jvp": _with_tangents("linear_ce", examples["linear_ce"], (-100,)),
        "rms_norm_jvp": _with_tangents("rms_norm", examples["rms_norm residual"], (1e-2,)),
    }


EXAMPLES = _examples()
