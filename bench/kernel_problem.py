"""What the benchmarks of all operators share: orders, the tensors of a problem, and when a result is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

ORDERS = ("forward", "backward", "double-backward", "all")
# A result may be off by SLACK times what the plain formulas are at the same dtype, and one epsilon of it.
SLACK = 4.0

Places = list[Tensor | None]
"""For each result of an order: the rows that were computed exactly, or None for all of them."""
Truth = tuple[list[Tensor], list[float], Places]
"""The results of an order, how far from each one may be, and which rows of it they are."""


class Draw(NamedTuple):
    """The tensors of a problem.

    inputs: what is differentiated. constants: the other arguments. d_outputs: cotangents of the outputs.
    g_inputs: cotangents of the gradients. curved: for each input whether the gradients depend on it; where they do
    not, its second cotangent is zero, and nobody is asked for it.
    """

    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    d_outputs: tuple[Tensor, ...]
    g_inputs: tuple[Tensor, ...]
    curved: tuple[bool, ...]

    def each(self, change: Callable[[Tensor], Tensor]) -> Draw:
        """The same with every floating tensor changed."""

        def changed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(change(t) if t.is_floating_point() else t for t in tensors)

        return Draw(*(changed(part) for part in self[:4]), self.curved)


class Problem(Protocol):
    """Settings of an operator, as a frozen dataclass whose fields are JSON.

    It has what its ceiling counts (kernel_ceiling.py): `flops(order)`, useful operations, each product once, nothing
    made again, two per multiply-add; or `bytes(order)`, useful traffic, each tensor read once and written once.
    """

    dtype: str

    @property
    def length(self) -> int:
        """What grows from one problem of a run to the next."""

    def inputs(self, device: torch.device) -> Any:
        """The same values in every process."""

    def short(self) -> Any:
        """The same problem, short enough to be computed in float64 whole."""


class Prepares(Protocol):
    """As `bench.kernel_contenders.Contender`."""

    def prepare(self, problem: Any, x: Any, order: str) -> Callable[[], tuple[Tensor, ...]]: ...


def generator() -> torch.Generator:
    """Where a problem's values come from."""
    return torch.Generator().manual_seed(0)


def truths(
    formulas: Prepares, problem: Problem, orders: Sequence[str], plain: Prepares | None = None
) -> dict[str, dict[str, Truth]]:
    """For each order all that is right of the `short` and of the `whole` problem; see `everything`."""
    short = problem.short()
    found = {"short": everything(formulas, short, orders, plain)}
    whole = found["short"] if short == problem else everything(formulas, problem, orders, plain)
    return found | {"whole": whole}


def everything(
    formulas: Prepares, problem: Any, orders: Sequence[str], plain: Prepares | None = None
) -> dict[str, Truth]:
    """Each order's results in float64 by the formulas on the processor.

    What these are off at the problem's dtype is tolerated, or what `plain` is, where the formulas compute sums in more
    than the dtype has.
    """
    x = problem.inputs(torch.device("cpu"))
    exact = computed(formulas, problem, x.each(Tensor.double), orders)
    rounded = computed(plain or formulas, problem, x, orders)
    return {order: truth(exact[order], rounded[order], eps_of(x)) for order in orders}


def computed(formulas: Prepares, problem: Any, x: Draw, orders: Sequence[str]) -> dict[str, list[Tensor]]:
    """Every result of the orders."""
    single = [order for order in ORDERS[:3] if order in orders or "all" in orders]
    found = {order: list(formulas.prepare(problem, x, order)()) for order in single}
    return found | {"all": [t for order in single for t in found[order]]} if "all" in orders else found


def eps_of(x: Draw) -> float:
    """The epsilon of what is differentiated."""
    return torch.finfo(x.inputs[0].dtype).eps


def truth(
    exact: Sequence[Tensor], plain: Sequence[Tensor], eps: float, places: Places | None = None
) -> Truth:
    """The exact results with their tolerances, given those of the plain formulas at the dtype in question."""
    assert all(t.norm() > 0 for t in exact), "a truth is all zeros"
    honest = [relative_error(p, t) for p, t in zip(plain, exact, strict=True)]
    return list(exact), [SLACK * error + eps for error in honest], places or [None] * len(exact)


def verdicts(
    found: Sequence[Tensor], results: Sequence[Tensor], tolerances: Sequence[float], places: Places
) -> list[tuple[float, float]]:
    """Error and tolerance of each result."""
    rows = [f if p is None else f[p.to(f.device)] for f, p in zip(found, places, strict=True)]
    errors = (relative_error(f.cpu(), r) for f, r in zip(rows, results, strict=True))
    return list(zip(errors, tolerances, strict=True))


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; another shape, NaN and infinity count as infinite."""
    if value.shape != truth.shape:
        return float("inf")
    error = float((value.double() - truth).norm() / truth.norm())
    return error if error < float("inf") else float("inf")
