"""Cross-entropy of a linear layer that never holds all logits."""

from typing import Literal

import torch
from torch import Tensor

from ttt_kernels import checks, tangents
from ttt_kernels.backends import in_transform, refuse_on_cpu, refuse_on_triton
from ttt_kernels.extension import compute_dtype
from ttt_kernels.jvp import twin
from ttt_kernels.linear_ce import cpu, reference, targets, triton
from ttt_kernels.registry import Operator

Reduction = Literal["none", "sum", "mean"]


def _fake(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, keep_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    nll, lse = (x.new_empty(target.shape, dtype=dtype) for _ in range(2))
    return nll, lse, x.new_empty(x.shape if keep_slope else 0, dtype=dtype)


operator = Operator(
    name="linear_ce",
    inputs={"x": "Tensor", "weight": "Tensor", "target": "Tensor"},
    params={"ignore_index": "int", "keep_slope": "bool"},
    outputs={"nll": "Tensor"},
    saved={"lse": "Tensor", "slope": "Tensor"},
    differentiable=("x", "weight"),
    fake=_fake,
    kernels={
        "reference": {
            "forward": reference.forward,
            "backward": reference.backward,
            "double_backward": reference.double_backward,
        },
        "cpu": {"forward": cpu.forward, "backward": cpu.backward, "double_backward": cpu.double_backward},
        "triton": {
            "forward": triton.forward,
            "backward": triton.backward,
            "double_backward": triton.double_backward,
        },
    },
    refusals={"cpu": refuse_on_cpu, "triton": refuse_on_triton},
)
"""The loss of every row as a registered operator, x (N, d) and target (N,).

Where `keep_slope`, `slope` is the gradient of every row's loss with respect to its row of x; otherwise it has no
elements, and `backward` cannot give x's gradient nor `double_backward` take its cotangent. It comes with one product
more of the pass over the vocabulary that the losses need, and spares the gradient two.
"""
jvp_operator = twin(operator, keep_slope=True)


def _fake_slope(
    x: Tensor, weight: Tensor, target: Tensor, known: list[Tensor], ignore_index: int, of_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    nll, lse, slope = _fake(x, weight, target, ignore_index, True)
    return nll, slope, lse


slope_operator = Operator(
    name="linear_ce_slope",
    inputs={"x": "Tensor", "weight": "Tensor", "target": "Tensor", "known": "Tensor[]"},
    params={"ignore_index": "int", "of_slope": "bool"},
    outputs={"nll": "Tensor", "slope": "Tensor"},
    saved={"lse": "Tensor"},
    differentiable=("x", "weight"),
    fake=_fake_slope,
    kernels={
        "reference": {"forward": reference.slope_forward, "backward": reference.slope_backward},
        "cpu": {"forward": cpu.slope_forward, "backward": cpu.slope_backward},
        "triton": {"forward": triton.slope_forward, "backward": triton.slope_backward},
    },
    refusals=operator.refusals,
    keeps=("slope",),
)
"""The loss of every row together with its slope, both differentiable once.

What `operator` does in two orders, for a caller that needs the gradient in x itself (an inner step): the derivatives of
both results share products. `known` is empty, or nll, slope and lse of an earlier call with the same values, which are
then not computed again; without `of_slope` the slope counts as a constant.
"""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the logits x weight^T, in nats, computed block by block of the vocabulary.

    Args:
        x: (..., d), any floating dtype; statistics and losses are float32 (float64 for float64).
        weight: (V, d), x's dtype, or float32 beside a bfloat16 or float16 x: then rounded to x's dtype for
            the products, its gradient in float32.
        target: (...), x's leading shape, int64 or int32: a class in [0, V), or `ignore_index`.
        ignore_index: the target of positions that do not count: loss 0, no gradient.
        reduction: "none", "sum", or "mean" over the targets that count; a mean over none is 0.
        backend: None for the best that can run, or a backend's name.

    Returns:
        The loss, float32 or float64: of target's shape for "none", else without dimensions. Differentiable
        twice with respect to x and weight (any number of times on the reference backend, where automatic
        differentiation keeps what every block computed).

    Raises:
        ValueError: an argument has an unsuitable shape, dtype or device, a target is neither a class nor
            `ignore_index`, or the backend cannot serve the call.
    """
    _check("linear_cross_entropy", x, weight, target, reduction)
    rows, labels = x.reshape(target.numel(), x.shape[-1]), target.reshape(-1).long()
    chosen = operator.select(backend, rows, weight, labels)
    if chosen != "cpu":
        _check_targets(labels, weight, ignore_index)
    # The reference differentiates its formulas, not what it saves.
    keep_slope = chosen != "reference" and torch.is_grad_enabled() and rows.requires_grad
    nll = operator.forward(rows, weight, labels, ignore_index, keep_slope, backend=chosen)[0]
    return _reduced(nll, target, ignore_index, reduction)


def linear_cross_entropy_jvp(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    x_dot: Tensor | None = None,
    weight_dot: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` and its directional derivative along the tangents of x and weight.

    Args:
        x, weight, target, ignore_index, reduction: as in `linear_cross_entropy`.
        x_dot, weight_dot: shape, dtype and device of their arguments; None is zero and costs nothing.
        backend: None for the best that can run, or a backend's name.

    Returns:
        (loss, tangent of the loss). Differentiable once in reverse with respect to all four tensors (any number
        of times on the reference backend).

    Raises:
        ValueError: as `linear_cross_entropy`, or a tangent is not like its argument.
    """
    _check("linear_cross_entropy_jvp", x, weight, target, reduction)
    tangents.check("linear_cross_entropy_jvp", x=(x, x_dot), weight=(weight, weight_dot))
    rows, labels = x.reshape(target.numel(), x.shape[-1]), target.reshape(-1).long()
    t_rows = None if x_dot is None else x_dot.reshape(rows.shape)
    tensors = (rows, weight, labels, t_rows, weight_dot)
    chosen = jvp_operator.select(backend, *tensors)
    if chosen != "cpu":
        _check_targets(labels, weight, ignore_index)
    nll, tangent, *_ = jvp_operator.forward(*tensors, ignore_index, backend=chosen)
    return (
        _reduced(nll, target, ignore_index, reduction),
        _reduced(tangent, target, ignore_index, reduction),
    )


def _check_targets(target: Tensor, weight: Tensor, ignore_index: int) -> None:
    """Looks at the values where there are any to look at: not while a call is traced, transformed or captured."""
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if not torch.compiler.is_compiling() and not in_transform((target, weight)):
        targets.check(target, weight.shape[0], ignore_index)


def _reduced(nll: Tensor, target: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return nll.reshape(target.shape)
    if reduction == "sum":
        return nll.sum()
    return nll.sum() / (target != ignore_index).sum().clamp(min=1)


def _check(operator: str, x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> None:
    checks.floating(operator, x=x, weight=weight)
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        got = f"dtype {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"{operator}: target has {got}; accepted are tensors of torch.int64 and torch.int32")
    checks.same_device(operator, x=x, weight=weight, target=target)
    checks.weight_dtype(operator, x, weight=weight)
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] < 1:
        raise ValueError(
            f"{operator}: weight has shape {checks.shape(weight)}; accepted is (V, d) with V at least 1 and "
            f"d x's last size, x having shape {checks.shape(x)}"
        )
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"{operator}: target has shape {checks.shape(target)}; accepted is x's leading shape "
            f"{checks.shape(x[..., 0])}, x having shape {checks.shape(x)}"
        )
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"{operator}: reduction is {reduction!r}; accepted are 'none', 'sum' and 'mean'")
