"""The loss of a linear layer that is measured: its tensors, its useful operations, and what is right, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.kernel_contenders import Contender
from bench.kernel_problem import Draw, Truth, eps_of, everything, generator, truth
from engine.config import DTYPES
from ttt_kernels.linear_ce import reference
from ttt_kernels.matmul import mm

# Each is a multiply-add per row, class and element of hidden. Backward: x's and the weight's gradient. The second
# order, with cotangents a and b of those, q of the logits and dl their gradient: a W^T, x b^T, q W, dl b, q^T x and
# dl^T a. The logits made again are not useful.
PRODUCTS = {"forward": 1, "backward": 2, "forward-backward": 3, "double-backward": 6, "all": 9}
ORDERS = tuple(PRODUCTS)
IGNORED = -100
CHECK_TOKENS, CHECK_VOCAB = 128, 4096
ROWS, CLASSES = 16, 32


@dataclass(frozen=True)
class Problem:
    """Each row's loss over `vocab` classes for `tokens` rows of `hidden` elements, as in their mean."""

    tokens: int
    hidden: int
    vocab: int
    dtype: str

    @property
    def length(self) -> int:
        return self.tokens

    def flops(self, order: str) -> int:
        """Useful operations, two per multiply-add."""
        return PRODUCTS[order] * 2 * self.tokens * self.hidden * self.vocab

    def logits_bytes(self) -> int:
        """Bytes of all logits, in float32."""
        return self.tokens * self.vocab * 4

    def inputs(self, device: torch.device) -> Draw:
        """Rows of standard normal values, logits about twice as large, and the cotangents of a mean."""
        source, dtype = generator(), DTYPES[self.dtype]

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=source)).to(device, dtype)

        x, upper = (draw(self.tokens, self.hidden) for _ in range(2))
        weight, upper_weight = (
            draw(self.vocab, self.hidden, scale=s * self.hidden**-0.5) for s in (2.0, 1.0)
        )
        target = torch.randint(self.vocab, (self.tokens,), generator=source).to(device)
        d_nll = torch.full((self.tokens,), 1 / self.tokens, device=device)
        return Draw((x, weight), (target,), (d_nll,), (upper, upper_weight), (True, True))

    def short(self) -> Problem:
        """The same problem with few rows and classes."""
        return replace(self, tokens=min(self.tokens, CHECK_TOKENS), vocab=min(self.vocab, CHECK_VOCAB))


def truths(formulas: Contender, problem: Problem, orders: Sequence[str]) -> dict[str, dict[str, Truth]]:
    """For each order what is right: all of the `short` problem; of the whole one all losses, some rows and classes."""
    short = problem.short()
    asked = [order for order in orders if order != "forward-backward"]
    # What comes together is right where its parts are.
    if "forward-backward" in orders and "backward" not in asked:
        asked.append("backward")
    found = {"short": everything(formulas, short, asked)}
    found["whole"] = found["short"] if short == problem else sampled(problem, asked)
    for part in found.values() if "forward-backward" in orders else ():
        part["forward-backward"] = part["backward"]
    return found


def sampled(problem: Problem, orders: Sequence[str]) -> dict[str, Truth]:
    """All losses and their second cotangents; of what belongs to x some rows, of the weight's some classes."""
    x = problem.inputs(torch.device("cpu"))
    rows = spread(problem.tokens, ROWS)
    classes = torch.unique(torch.cat((spread(problem.vocab, CLASSES), x.constants[0][rows])))
    exact = _slices(x, torch.float64, orders, rows, classes)
    plain = _slices(x, x.inputs[0].dtype, orders, rows, classes)
    places = {"forward": [None], "backward": [rows, classes], "double-backward": [None, rows, classes]}
    places["all"] = [place for part in places.values() for place in part]
    return {order: truth(exact[order], plain[order], eps_of(x), places[order]) for order in orders}


def spread(count: int, some: int) -> Tensor:
    """At most `some` of the indices below `count`, the first and the last among them."""
    return torch.unique(torch.linspace(0, count - 1, min(some, count)).long())


def _slices(
    x: Draw, dtype: torch.dtype, orders: Sequence[str], rows: Tensor, classes: Tensor
) -> dict[str, list[Tensor]]:
    """The results of the orders by the plain formulas, where they are computed; the weights stay as they are.

    A row's results depend on no other row, so the reference computes them alone. A class's depend on all rows, but on
    other classes only through each row's two sums over them.
    """
    (h, weight), (target,), (d,), (a, b) = x.inputs, x.constants, x.d_outputs, x.g_inputs
    h, a, d = h.to(dtype), a.to(dtype), d.to(torch.promote_types(dtype, torch.float32))
    settings = (IGNORED, False)
    nll, lse, none = reference.forward(h, weight, target, *settings)
    found = {"forward": [nll]}
    own = (target[:, None] == classes).to(lse.dtype)
    p = torch.exp(mm(h, weight[classes].mT, lse.dtype) - lse[:, None])
    d_logits = (d[:, None] * (p - own)).to(dtype)
    some = (d[rows], h[rows], weight, target[rows], lse[rows], none, *settings)
    wide = torch.promote_types(weight.dtype, dtype)
    if set(orders) != {"forward"}:
        dx, _ = reference.backward(*some, needs=(True, False))
        assert dx is not None
        found["backward"] = [dx, mm(d_logits.mT, h, wide)]
    if {"double-backward", "all"} & set(orders):
        all_rows = (d, h, weight, target, lse, none, *settings)
        rise, *_ = reference.double_backward(a, b, *all_rows, needs=(True, False, False))
        _, to_x, _ = reference.double_backward(a[rows], b, *some, needs=(False, True, False))
        assert rise is not None
        assert to_x is not None
        along = mm(a, weight[classes].mT, lse.dtype) + mm(h, b[classes].mT, lse.dtype)
        mean = rise + (a * weight[target]).sum(1) + (h * b[target]).sum(1)
        q = (d[:, None] * p * (along - mean[:, None])).to(dtype)
        to_weight = mm(q.mT, h, wide) + mm(d_logits.mT, a, wide)
        found["double-backward"] = [rise, to_x, to_weight]
        found["all"] = [t for part in ("forward", "backward", "double-backward") for t in found[part]]
    return found
