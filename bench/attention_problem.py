"""The attention that is measured: its tensors, its useful operations, and what is right, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.flops import visible_pairs
from bench.kernel_problem import ORDERS, SLACK, relative_error
from engine.config import DTYPES
from ttt_kernels.swa import reference

# Each product is one multiply-add per visible pair, head and element of head_dim. A backward that computes the
# scores again makes five, a double backward more than twelve: those are not useful.
PRODUCTS = {"forward": 2, "backward": 4, "double-backward": 12, "all": 18}

CHECK_LENGTH = 1024
TAIL = 128

Truth = tuple[list[Tensor], list[float]]
"""The results of an order, (B, rows, H, D) each, and how far from each one may be."""


class Inputs(NamedTuple):
    """(B, T, H, D) each: the arguments, the cotangent of the output, and those of the three gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor
    a: Tensor
    b: Tensor
    c: Tensor


@dataclass(frozen=True)
class Problem:
    """Causal attention of `length` queries to as many keys."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    dtype: str

    @property
    def windowed(self) -> bool:
        """Whether the window hides any key that causality alone does not."""
        return self.window is not None and self.window < self.length

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def flops(self, order: str) -> int:
        """Useful operations, two per multiply-add."""
        pairs = self.batch * self.heads * visible_pairs(self.length, self.length, self.window)
        return PRODUCTS[order] * 2 * self.head_dim * pairs

    def score_bytes(self) -> int:
        """Bytes of one matrix of all scores, in float32."""
        return self.batch * self.heads * self.length**2 * 4

    def inputs(self, device: torch.device) -> Inputs:
        """Standard normal values, the same in every process."""
        generator = torch.Generator().manual_seed(0)

        def draw(heads: int) -> Tensor:
            shape = (self.batch, self.length, heads, self.head_dim)
            return torch.randn(shape, generator=generator).to(device, DTYPES[self.dtype])

        h, g = self.heads, self.kv_heads
        return Inputs(draw(h), draw(g), draw(g), draw(h), draw(h), draw(g), draw(g))

    def short(self) -> Problem:
        """The same problem, short enough to be computed in float64 whole; its window still moves."""
        if self.length <= CHECK_LENGTH:
            return self
        window = min(self.window, 3 * CHECK_LENGTH // 4) if self.window and self.windowed else self.window
        return replace(self, length=CHECK_LENGTH, window=window)


def truths(problem: Problem, orders: Sequence[str]) -> dict[str, dict[str, Truth]]:
    """For each order, what is right: every row of the `short` problem, the last rows of the `whole` one."""
    short = problem.short()
    return {
        "short": last_rows(short, orders, short.length),
        "whole": last_rows(problem, orders, min(TAIL, problem.length)),
    }


def last_rows(problem: Problem, orders: Sequence[str], rows: int) -> dict[str, Truth]:
    """The last `rows` rows of each order's results in float64, by the formulas on the processor.

    Causality makes that cheap at any length: they depend on the last `rows` queries and on the keys that those
    see, and on nothing else.
    """
    keys = rows if rows == problem.length else rows + (problem.window or problem.length) - 1
    x = problem.inputs(torch.device("cpu"))
    q, d_o, a = (_last(t, rows) for t in (x.q, x.d_o, x.a))
    k, v, b, c = (_last(t, keys) for t in (x.k, x.v, x.b, x.c))
    tail = Inputs(q, k, v, d_o, a, b, c)
    exact = _by_formulas(Inputs(*(t.double() for t in tail)), problem, orders)
    plain = _by_formulas(tail, problem, orders)
    eps = torch.finfo(DTYPES[problem.dtype]).eps
    found = {}
    for order in orders:
        results = [_last(t, rows).clone() for t in exact[order]]
        assert all(t.norm() > 0 for t in results), f"{order}: the truth is all zeros"
        honest = [relative_error(_last(p, rows), r) for p, r in zip(plain[order], results, strict=True)]
        found[order] = results, [SLACK * error + eps for error in honest]
    return found


def verdicts(
    found: Sequence[Tensor], results: Sequence[Tensor], tolerances: Sequence[float]
) -> list[tuple[float, float]]:
    """Error and tolerance of each result, compared where the truth has rows."""
    errors = (relative_error(_last(f, r.shape[1]).cpu(), r) for f, r in zip(found, results, strict=True))
    return list(zip(errors, tolerances, strict=True))


def _last(t: Tensor, rows: int) -> Tensor:
    return t[:, max(t.shape[1] - rows, 0) :]


def _by_formulas(x: Inputs, problem: Problem, orders: Sequence[str]) -> dict[str, list[Tensor]]:
    """Every result of the orders; the gradients of d_o, q, k and v are the double backward's."""
    given = (x.q, x.k, x.v, None, None)
    settings = (problem.window, problem.scale, 0, True)
    kept = reference.forward(*given, *settings)
    results = {"forward": [kept[0]]}
    if set(orders) != {"forward"}:
        results["backward"] = _given(
            reference.backward(x.d_o, *given, *kept, *settings, needs=(True, True, True))
        )
    if {"double-backward", "all"} & set(orders):
        results["double-backward"] = _given(
            reference.double_backward(
                x.a, x.b, x.c, x.d_o, *given, *kept, *settings, needs=(True, True, True, True)
            )
        )
        results["all"] = [t for order in ORDERS[:3] for t in results[order]]
    return results


def _given(results: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [t for t in results if t is not None]
