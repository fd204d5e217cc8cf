"""RMSNorm on the Triton kernels of triton_*.py, which a first call imports."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_kernels import triton_launch
from ttt_kernels.backends import refuse_on_triton
from ttt_kernels.rms_norm.triton_configs import LARGEST, SUMMED, configs, sums
from ttt_kernels.rms_norm.triton_configs import span as span_of
from ttt_kernels.rms_norm.triton_located import Rows, rows_of

_MOST_ROWS = 2**31 - 2**22
"""Kernels count rows in 32 bits, those included that the last tile, or the last program that sums over them, lacks."""


def refuse(tensors: tuple[Tensor, ...]) -> str | None:
    """What the kernels cannot take besides what no Triton kernel can: long rows, and more than 32 bits count."""
    x = tensors[0]
    n = x.shape[-1]
    if n > LARGEST:
        return f"rows have {n} elements; accepted are up to {LARGEST}"
    if n and x.numel() // n > _MOST_ROWS:
        return f"there are {x.numel() // n} rows; accepted are up to {_MOST_ROWS}"
    return refuse_on_triton(tensors)


def _launch(
    order: str, kernel: Any, rows: Rows, like: Tensor, arguments: dict[str, Any], span: int | None = None
) -> None:
    """Launches a kernel over rows, each program having a tile of them or, where it sums over them, `span`."""
    n = like.shape[-1]
    triton_launch.launch(
        f"rms_norm.{order}",
        kernel,
        lambda sizes: -(-rows.count // (span or sizes["ROWS"])),
        configs(order, n),
        (like.dtype, n, rows.rank),
        like.device,
        {
            **arguments,
            "rows": rows.count,
            "middle": rows.middle,
            "inner": rows.inner,
            "N": n,
            "RANK": rows.rank,
        },
    )


def _launch_all(
    order: str,
    kernel: Any,
    rows: Rows,
    like: Tensor,
    shared: dict[str, Any],
    results: dict[str, Any],
    wanted: bool,
    partial: Tensor | None,
    span: int | None,
) -> None:
    """Launches a kernel for what is `wanted` of rows and for sums over rows: at once where registers hold both.

    `results` are the arguments that only the former needs.
    """
    apart = partial is not None and like.shape[-1] > SUMMED
    if wanted and (apart or partial is None):
        _launch(order, kernel, rows, like, {**shared, **results, "p_partial": None})
    if partial is not None:
        rest = dict.fromkeys(results) if apart else results
        _launch(order, kernel, rows, like, {**shared, **rest, "p_partial": partial}, span)


def _partial(order: str, rows: Rows, like: Tensor, need: bool) -> tuple[Tensor | None, int | None]:
    """Memory for the partial sums over rows, and how many rows each is of."""
    if not need:
        return None, None
    n = like.shape[-1]
    span = span_of(rows.count, order, n)
    return like.new_empty((-(-rows.count // span), n), dtype=torch.float32), span


def _total(partial: Tensor | None, weight: Tensor) -> Tensor | None:
    """The sum of partial sums, as the weight."""
    from ttt_kernels.rms_norm import triton_kernels as kernels

    if partial is None:
        return None
    found, n = weight.new_empty(weight.shape), len(weight)
    triton_launch.launch(
        "rms_norm.total", kernels.total, lambda sizes: -(-n // sizes["BLOCK"]), (sums(),), (), weight.device,
        {"p_partial": partial, "p_sum": found, "count": len(partial), "N": n},
    )  # fmt: skip
    return found


def forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    from ttt_kernels.rms_norm import triton_kernels as kernels

    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        rows = rows_of([x, residual])
        t_x, t_residual = rows.located
        _launch("forward", kernels.forward, rows, x, {
            "t_x": t_x, "p_weight": weight.contiguous(), "t_residual": t_residual, "p_y": y, "p_rstd": rstd, "eps": eps,
        })  # fmt: skip
    return y, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.backward`."""
    from ttt_kernels.rms_norm import triton_kernels as kernels

    dx, d_residual = (x.new_empty(x.shape) if need else None for need in (needs[0], needs[2]))
    if x.numel() == 0:
        return dx, weight.new_zeros(weight.shape) if needs[1] else None, d_residual
    if d_residual is not None and not any(needs[:2]):
        return None, None, d_residual.copy_(dy)
    rows = rows_of([dy, x])
    t_dy, t_x = rows.located
    partial, span = _partial("backward", rows, x, needs[1])
    if any(needs):
        _launch("backward", kernels.backward, rows, x, {
            "t_dy": t_dy, "t_x": t_x, "p_weight": weight.contiguous(), "p_rstd": rstd.contiguous(), "p_dx": dx,
            "p_partial": partial, "p_residual": d_residual, "span": span or 0,
        }, span)  # fmt: skip
    return dx, _total(partial, weight), d_residual


def double_backward(
    g_x: Tensor | None,
    g_weight: Tensor | None,
    g_residual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.double_backward`."""
    from ttt_kernels.rms_norm import triton_kernels as kernels

    to_dy, to_x = (x.new_empty(x.shape) if need else None for need in needs[:2])
    to_residual = x.new_zeros(x.shape) if needs[3] else None
    if x.numel() == 0:
        return to_dy, to_x, weight.new_zeros(weight.shape) if needs[2] else None, to_residual
    rows = rows_of([g_x, g_residual, dy, x])
    t_a, t_z, t_dy, t_x = rows.located
    partial, span = _partial("double_backward", rows, x, needs[2])
    shared = {
        "t_a": t_a, "p_b": None if g_weight is None else g_weight.contiguous(), "t_dy": t_dy, "t_x": t_x,
        "p_weight": weight.contiguous(), "p_rstd": rstd.contiguous(), "span": span or 0,
    }  # fmt: skip
    results = {"t_z": t_z, "p_to_dy": to_dy, "p_to_x": to_x}
    wanted = any(needs[:2])
    _launch_all("double_backward", kernels.double_backward, rows, x, shared, results, wanted, partial, span)
    return to_dy, to_x, _total(partial, weight), to_residual


def jvp_backward(
    dy: Tensor,
    d_tangent: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    x_dot: Tensor | None,
    weight_dot: Tensor | None,
    residual_dot: Tensor | None,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The twin's backward, as `ttt_kernels.jvp.composed` makes it of the orders above, but in one pass."""
    from ttt_kernels.rms_norm import triton_kernels as kernels

    dx, d_residual, da, d_residual_dot = (
        x.new_empty(x.shape) if need else None for need in (needs[0], *needs[2:4], needs[5])
    )
    # The tangent of y is to w's tangent what y is to w.
    d_weight_dot = backward(d_tangent, x, weight, None, rstd, eps, (False, needs[4], False))[1]
    if x.numel() == 0:
        d_weight = weight.new_zeros(weight.shape) if needs[1] else None
        return dx, d_weight, d_residual, da, d_weight_dot, d_residual_dot
    rows = rows_of([dy, d_tangent, x, x_dot])
    t_dy, t_u, t_x, t_a = rows.located
    partial, span = _partial("jvp_backward", rows, x, needs[1])
    shared = {
        "t_dy": t_dy, "t_u": t_u, "t_x": t_x, "t_a": t_a,
        "p_b": None if weight_dot is None else weight_dot.contiguous(),
        "p_weight": weight.contiguous(), "p_rstd": rstd.contiguous(), "span": span or 0,
    }  # fmt: skip
    results = {"p_dx": dx, "p_da": da, "p_residual": d_residual, "p_residual_dot": d_residual_dot}
    wanted = any(t is not None for t in results.values())
    _launch_all("jvp_backward", kernels.jvp_backward, rows, x, shared, results, wanted, partial, span)
    return dx, _total(partial, weight), d_residual, da, d_weight_dot, d_residual_dot
