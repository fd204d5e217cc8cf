"""One call of a registered operator, and the arguments of all its orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttt_kernels.registry import Operator


def flat(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among values and lists of them."""
    return [t for v in values if v is not None for t in (v if isinstance(v, list | tuple) else [v])]


def like(value: Any, seed: int) -> Any:
    """Standard normal values of the shape, dtype and device of a tensor, or of each in a list."""
    if isinstance(value, list | tuple):
        return [like(v, seed + i) for i, v in enumerate(value)]
    generator = torch.Generator(value.device).manual_seed(seed)
    drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64, device=value.device)
    return drawn.to(value.dtype)


@dataclass(frozen=True)
class Example:
    """One call of an operator.

    Attributes:
        operator: the registered operator.
        inputs: values of all its inputs, floating tensors in float64 unless it is `cast`.
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

    def cast(self, dtype: torch.dtype) -> Example:
        """The same with tensors of another dtype."""
        return self.each(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def each(self, change: Callable[[Tensor], Tensor]) -> Example:
        """The same with every tensor changed."""
        given = [
            [change(t) for t in v] if isinstance(v, list) else change(v) if isinstance(v, Tensor) else v
            for v in self.inputs
        ]
        return Example(self.operator, tuple(given), self.params)

    def arguments(self, order: str, backend: str = "reference") -> list[Any]:
        """Positional arguments of an order's kernels but for `needs`; what forward gives is the backend's."""
        if order == "forward":
            return [*self.inputs, *self.params]
        count = len(self.operator.outputs)
        results = self.operator.kernels[backend]["forward"](*self.inputs, *self.params)
        kept = [results[list(self.operator.outputs).index(name)] for name in self.operator.keeps]
        d_outputs = [like(r, 50 + i) for i, r in enumerate(results[:count])]
        backward = [*d_outputs, *self.inputs, *kept, *results[count:], *self.params]
        if order == "backward":
            return backward
        return [*self.cotangents(), *backward]

    def cotangents(self) -> list[Any]:
        """Cotangents of all gradients."""
        names = list(self.operator.inputs)
        gradients = [self.inputs[names.index(name)] for name in self.operator.differentiable]
        if self.operator.fake_backward is not None:
            gradients = self.operator.fake_backward(*self.inputs, *self.params)
        return [None if v is None else like(v, 70 + 5 * i) for i, v in enumerate(gradients)]

    def carried(self) -> list[Tensor]:
        """Cotangents of the saved values that have their own."""
        results = self.operator.kernels["reference"]["forward"](*self.inputs, *self.params)
        saved = results[len(self.operator.outputs) :]
        names = list(self.operator.saved)
        return [like(saved[names.index(name)], 90 + i) for i, name in enumerate(self.operator.carries)]

    def wanted(self, order: str) -> list[bool]:
        """`needs` for all results that there are."""
        names = list(self.operator.inputs)
        gradients = [self.inputs[names.index(name)] is not None for name in self.operator.differentiable]
        return gradients if order == "backward" else [True] * len(self.operator.outputs) + gradients
